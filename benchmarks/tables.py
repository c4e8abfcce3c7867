"""Results as Markdown: whole tables for docs/benchmarks.md, eight rows for the README."""

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
        "layers": "What does a step cost where upper layers alone train?",
        "pass": "What does a pass over sentences cost, padded as each way pads?",
    },
    "selection": {
        "whole": "How long until we know which term to train?",
        "gains": "What do the gains of all terms cost, beside a pass over the same rows?",
    },
    "selection_sst2": {
        "whole": "How long until we know which term to train, on real data?",
        "gains": "What do the gains cost there, beside a pass over the same rows?",
    },
    "fisher": {
        "step": "What does the per-example Fisher information of all biases cost?",
        "rows": "What do the gradients of single examples cost, whole or projected?",
    },
    "choices": {"ranking": "How long does it take to rank options by a decoder?"},
    "host": {
        "step": "What does the host add to a step, where kernels do little?",
        "optimizer": "What does the host add to an optimizer's step over small biases?",
    },
    "growth": {"axes": "How do time and memory of a training step grow?"},
    "rows": {"pass": "What do many rows cost, from the file to the last batch?"},
    "rungs": {
        "sums": "What does each rung to `bias_grad_stats` bring?",
        "steps": "What does each rung to `bias_adamw_step` bring?",
    },
}


def records(root: Path) -> Iterator[tuple[Path, Record]]:
    """Every result file with what it holds, by device, in the order of PARTS."""
    for device in sorted(root.glob("benchmarks/results/*/")):
        for name in PARTS:
            path = device / f"{name}.json"
            if path.is_file():
                yield path, json.loads(path.read_text(encoding="utf-8"))


def provenance(record: Record) -> str:
    """Machine, versions and day of a record; also that it is stale where kernels have changed."""
    where = f"{record['device']}, {record['threads']} threads, torch {record['torch']}"
    where += f", {record['date'][:10]}" if "date" in record else ""
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
    "us_a_tap": ("host's time a tap", lambda s: f"{s['us_a_tap']:.0f} µs"),
    "bytes_per_s": ("GB/s", lambda s: f"{s['bytes_per_s'] / 1e9:.1f}"),
    "error": ("error", lambda s: f"{s['error']:.1e}"),
    "of_read": ("of a plain read", lambda s: f"{s['of_read']:.0%}"),
    "rows_per_s": ("rows/s", lambda s: f"{s['rows_per_s']:,.0f}"),
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
            if part not in record:  # of before it was asked
                continue
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
    yield line("", "case", *heads, *(["time to ours"] if relative else []))
    yield line(*["---"] * (2 + len(heads) + relative))
    for where, group in found.items():
        for case, s in group.items():
            if "missing" in s:
                reason = s["missing"].replace("|", "\\|")
                yield line(where, case, f"missing: {reason}", *[""] * (len(heads) - 1 + relative))
                continue
            cells = [show(s) if key in s else "" for key, (_, show) in columns.items()]
            ratio = [f"{s['median_s'] / group['ours']['median_s']:.2f}"] if relative else []
            yield line(where, case, *cells, *ratio)


def _exponents(axes: Record) -> Iterator[str]:
    yield line("doubled", "exponent of time", "exponent of memory")
    yield line(*["---"] * 3)
    for axis, found in axes.items():
        e = found["exponents"]
        yield line(axis, f"{e['median_s']:.2f}", f"{e['peak_bytes']:.2f}")


# The README's rows: file, part and group of a record, what is told of it, and beside which case.
README_ROWS: tuple[tuple[str, str, str, str, str], ...] = (
    ("optimizer", "step", "BERT-base", "one AdamW step of all biases, BERT-base", "torch fused"),
    ("optimizer", "step", "OPT-6.7B", "the same, OPT-6.7B", "torch fused"),
    ("training", "step", "MiniLM", "a training step of one term, MiniLM", "PEFT BEFT"),
    ("training", "pass", "MiniLM, 64 sentences", "64 sentences", "authors' way, padded to 128"),
    ("fisher", "step", "MiniLM", "Fisher information of single examples", "Opacus"),
    ("selection_sst2", "whole", "MiniLM, 1,000 rows of SST-2", "which term?", "authors' pipeline"),
    ("choices", "ranking", "6 x 384, yes or no", "options ranked by a decoder", "one by one"),
)


def key_rows(root: Path) -> str:
    """Eight rows at most for each device: what ours takes, and how many times that a peer takes."""
    lines: list[str] = []
    for device, found in _by_device(root).items():
        lines += ["", f"**{device}**; more than 1: ours is faster.", ""]
        lines += [line("what", "ours", "beside", "times ours"), line(*["---"] * 4)]
        if "operators" in found:
            lines.append(_limit(found["operators"]))
        for name, part, group, what, peer in README_ROWS:
            cases = found.get(name, {}).get(part, {}).get(group, {})
            if "median_s" in cases.get("ours", {}) and "median_s" in cases.get(peer, {}):
                mark = "" if found[name]["kernel_digest"] == digest() else " (stale)"
                lines.append(line(what + mark, *_against(cases, peer)))
    if any("(stale)" in line for line in lines):
        lines += ["", "Stale: the kernels have changed since it was measured."]
    return "\n".join(lines).strip()


def _by_device(root: Path) -> dict[str, dict[str, Record]]:
    """Records by what they were measured on."""
    found: dict[str, dict[str, Record]] = {}
    for path, record in records(root):
        where = f"{record['device']}, {record['threads']} threads, torch {record['torch']}"
        found.setdefault(where, {})[path.stem] = record
    return found


def _against(cases: Mapping[str, Record], peer: str) -> tuple[str, str, str]:
    ours, theirs = cases["ours"]["median_s"], cases[peer]["median_s"]
    return time(ours), peer, f"{theirs / ours:.2f}"


def _limit(record: Record) -> str:
    """The largest fp32 input, on all threads: bytes of it a second, beside a plain read of it."""
    threads, grid = list(record["threads_used"].items())[-1]
    key = [k for k in grid if k.endswith("float32")][-1]
    ours, read = (grid[key][case]["bytes_per_s"] for case in ("ours", "plain read"))
    mark = "" if record["kernel_digest"] == digest() else " (stale)"
    what = f"sums and squares of {key.removesuffix(' float32')} in fp32, threads: {threads}{mark}"
    return line(what, f"{ours / 1e9:.1f} GB/s", "plain read of the bytes", f"{ours / read:.2f}")


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
