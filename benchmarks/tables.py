"""Results as Markdown: whole tables for docs/benchmarks.md, key rows for the README."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import digest

Record = Mapping[str, Any]
# By file: each part's place in the record and the question that it answers.
PARTS: dict[str, dict[str, str]] = {
    "operators": {"threads_used": "How near is `bias_grad_stats` to the memory's limit?"},
    "optimizer": {"step": "What does one optimizer step over all biases cost?"},
    "training": {
        "step": "What does a training step of the value bias cost (16 x 128 tokens)?",
        "pass": "What does a pass over sentences cost, padded as each way pads?",
    },
    "selection": {"whole": "How long until we know which term to train?"},
    "selection_sst2": {"whole": "How long until we know which term to train, on real data?"},
    "fisher": {"step": "What does the per-example Fisher information of all biases cost?"},
    "choices": {"ranking": "How long does it take to rank options by a decoder?"},
    "growth": {"axes": "How do time and memory of a training step grow?"},
}


def records(root: Path) -> Iterator[tuple[Path, Record]]:
    """Every result file with what it holds, by device, in the order of PARTS."""
    for device in sorted(root.glob("benchmarks/results/*/")):
        for name in PARTS:
            path = device / f"{name}.json"
            if path.is_file():
                yield path, json.loads(path.read_text(encoding="utf-8"))


def provenance(record: Record) -> str:
    """Machine and versions of a record; and that it is stale where the kernels have changed."""
    where = f"{record['device']}, {record['threads']} threads, torch {record['torch']}"
    current = record["kernel_digest"] == digest()
    return where + ("" if current else "; **stale: the kernels have changed since**")


def time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def spread(s: Record) -> str:
    return f"{time(s['median_s'])} ({time(s['q1_s'])} to {time(s['q3_s'])})"


# Columns of the whole tables: those that a part's cases have.
COLUMNS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "median_s": ("time", spread),
    "bytes_per_s": ("GB/s", lambda s: f"{s['bytes_per_s'] / 1e9:.1f}"),
    "of_read": ("of a plain read", lambda s: f"{s['of_read']:.0%}"),
    "tokens_per_s": ("tokens/s", lambda s: f"{s['tokens_per_s']:,.0f}"),
    "peak_bytes": ("peak memory", lambda s: f"{s['peak_bytes'] / 2**20:,.1f} MiB"),
    "loss": ("loss", lambda s: f"{s['loss']:.4f}"),
    "ranking": ("ranking", lambda s: ", ".join(s["ranking"])),
}


def groups(name: str, part: Any) -> dict[str, dict[str, Record]]:
    """Cases by what they are measured on, of every kind of part in one shape."""
    if name == "growth":
        return {axis: found["sizes"] for axis, found in part.items()}
    if name != "operators":
        return dict(part)
    flat: dict[str, dict[str, Record]] = {}
    for threads, grid in part.items():
        for key, cases in grid.items():
            limit = cases["plain read"]["bytes_per_s"]
            flat[f"{key}, threads: {threads}"] = {
                case: s
                if "missing" in s or case in ("copy", "plain read")
                else {**s, "of_read": s["bytes_per_s"] / limit}
                for case, s in cases.items()
            }
    return flat


def whole(root: Path) -> str:
    """Every row of every result."""
    lines: list[str] = []
    for path, record in records(root):
        for part, question in PARTS[path.stem].items():
            lines += ["", f"## {question}", "", f"{provenance(record)}.", ""]
            lines += _rows(groups(path.stem, record[part]))
            if path.stem == "growth":
                lines += ["", *_exponents(record[part])]
    return "\n".join(lines)


def _rows(found: Mapping[str, Mapping[str, Record]]) -> Iterator[str]:
    cases = [s for group in found.values() for s in group.values()]
    columns = {k: v for k, v in COLUMNS.items() if any(k in s for s in cases)}
    relative = any("ours" in group for group in found.values())
    heads = [title for title, _ in columns.values()]
    yield _line("", "case", *heads, *(["time to ours"] if relative else []))
    yield _line(*["---"] * (2 + len(heads) + relative))
    for where, group in found.items():
        for case, s in group.items():
            if "missing" in s:
                reason = s["missing"].replace("|", "\\|")
                yield _line(where, case, f"missing: {reason}", *[""] * (len(heads) - 1 + relative))
                continue
            cells = [show(s) if key in s else "" for key, (_, show) in columns.items()]
            ratio = [f"{s['median_s'] / group['ours']['median_s']:.2f}"] if relative else []
            yield _line(where, case, *cells, *ratio)


def _exponents(axes: Record) -> Iterator[str]:
    yield _line("doubled", "exponent of time", "exponent of memory")
    yield _line(*["---"] * 3)
    for axis, found in axes.items():
        e = found["exponents"]
        yield _line(axis, f"{e['median_s']:.2f}", f"{e['peak_bytes']:.2f}")


def key_rows(root: Path) -> str:
    """A row for each thing measured, a column for each case: ours as time, others as a ratio."""
    lines: list[str] = []
    for path, record in records(root):
        for part, question in PARTS[path.stem].items():
            lines += ["", f"**{question}** ({provenance(record)})", ""]
            if path.stem == "growth":
                lines += _exponents(record[part])
            elif path.stem == "operators":
                lines += _limits(record[part])
            else:
                lines += _matrix(record[part])
    return "\n".join(lines)


def _matrix(found: Mapping[str, Mapping[str, Record]]) -> Iterator[str]:
    """Cases that are missing everywhere are in the whole tables alone, with their reasons."""
    names = dict.fromkeys(case for group in found.values() for case in group)
    yield _line("time, and ratio to it", *found)
    yield _line(*["---"] * (1 + len(found)))
    for case in names:
        yield _line(case, *(_cell(group, case) for group in found.values()))


def _cell(group: Mapping[str, Record], case: str) -> str:
    s = group[case]
    if "missing" in s:
        return "missing"
    if case == "ours":
        return time(s["median_s"])
    return f"{s['median_s'] / group['ours']['median_s']:.2f}"


def _limits(threads: Record) -> Iterator[str]:
    """The largest input of each dtype: bytes a second of the input read."""
    cases = ("plain read", "ours", "torch, sum alone", "torch, compiled")
    yield _line("largest input", "threads", *cases)
    yield _line(*["---"] * (2 + len(cases)))
    for count, grid in threads.items():
        largest = {key.rsplit(" ", 1)[1]: key for key in grid}
        for key in largest.values():
            speeds = [grid[key][case].get("bytes_per_s") for case in cases]
            cells = ["missing" if s is None else f"{s / 1e9:.1f} GB/s" for s in speeds]
            yield _line(key, count, *cells)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
