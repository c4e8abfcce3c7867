"""The README's tables from benchmarks/results/: run after a benchmark, checked by a test.

``python benchmarks/render.py`` rewrites the part of README.md between its two marks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import ROOT, digest

from beft_ext.files import whole_file

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
OURS = ("ours", "tapped")
TITLES = {
    "statistics": {
        "operator": "The reduction alone (gradient, sums and squares per example)",
        "step": "One forward and backward, all bias terms: what the statistics cost",
    },
    "optimizer": {"step": "One optimizer step over all biases"},
    "training": {"step": "One training step of the value bias, optimizer included"},
    "memory": {
        "statistics": "Peak memory of one forward and backward, beyond the model",
        "training": "Peak memory of one training step of the value bias, beyond the model",
    },
}


def tables(root: Path = ROOT) -> str:
    """All results as Markdown, devices and benchmarks in order of their names."""
    parts: list[str] = []
    for path in sorted(root.glob("benchmarks/results/*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        parts += _record(path, record)
    return "\n".join(parts)


def _record(path: Path, record: Mapping[str, Any]) -> Iterator[str]:
    stale = (
        "" if record["kernel_digest"] == digest() else " **Stale: the kernels have changed since.**"
    )
    for part, title in TITLES[path.stem].items():
        where = f"{record['device']}, {record['threads']} threads, torch {record['torch']}"
        yield f"\n**{title}** ({where}).{stale}\n"
        yield from _memory(record[part]) if path.stem == "memory" else _times(record[part])


def _times(part: Mapping[str, Any]) -> Iterator[str]:
    yield "| | case | time | ratio to ours |"
    yield "| --- | --- | --- | --- |"
    for name, cases in part.items():
        ours = next(s for c, s in cases.items() if c in OURS)
        for case, s in cases.items():
            low, high = (_time(s[k]) for k in ("q1_s", "q3_s"))
            ratio = s["median_s"] / ours["median_s"]
            yield f"| {name} | {case} | {_time(s['median_s'])} ({low} to {high}) | {ratio:.2f} |"


def _memory(part: Mapping[str, Any]) -> Iterator[str]:
    yield "| | case | peak | ratio to ours |"
    yield "| --- | --- | --- | --- |"
    for name, cases in part.items():
        ours = next(peak for case, peak in cases.items() if case in OURS)
        for case, peak in cases.items():
            yield f"| {name} | {case} | {peak / 2**20:,.1f} MiB | {peak / ours:.3f} |"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def rendered(readme: str, content: str) -> str:
    """``readme`` with ``content`` between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def main() -> None:
    readme = ROOT / "README.md"
    with whole_file(readme) as temporary:
        text = rendered(readme.read_text(encoding="utf-8"), tables())
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
