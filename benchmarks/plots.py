"""Two plots of the results as SVG: the operator under the memory's limit, and whole steps.

Each names the SHA-256 of the result file that it was drawn from in its metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beft_ext.files import whole_file

LINES = ("ours", "torch, sum alone", "torch, compiled", "copy", "plain read")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def source(path: Path) -> str:
    """The words that a plot's metadata holds of the file it shows."""
    return f"{path.stem} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def name(path: Path) -> str:
    return f"{path.stem}-{path.parent.name}.svg"


def operators(figure: Any, record: Mapping[str, Any]) -> None:
    """GB/s over the size of the input in fp32, with the measured limit, by threads."""
    for place, (threads, grid) in enumerate(record["threads_used"].items(), 1):
        axes = figure.add_subplot(1, len(record["threads_used"]), place)
        for case in LINES:
            points = sorted(
                (_size(key), group[case]["bytes_per_s"] / 1e9)
                for key, group in grid.items()
                if key.endswith("float32") and "bytes_per_s" in group.get(case, {})
            )
            style = {"color": "black", "linestyle": "--"} if case == "plain read" else {}
            axes.plot(*zip(*points, strict=True), marker="o", label=case, **style)
        axes.set(xscale="log", xlabel="MiB of fp32 input", ylabel="GB/s", ylim=(0, None))
        axes.set_title(f"bias_grad_stats, threads: {threads}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _size(key: str) -> float:
    rows, _, width, dtype = key.split()
    return int(rows) * int(width) * BYTES[dtype] / 2**20


def training(figure: Any, record: Mapping[str, Any]) -> None:
    """Tokens a second of each way to train, by model."""
    parts = {**record["step"], **record["pass"]}
    for place, (title, cases) in enumerate(parts.items(), 1):
        axes = figure.add_subplot(1, len(parts), place)
        present = {c: s["tokens_per_s"] for c, s in cases.items() if "tokens_per_s" in s}
        colours = ["tab:blue" if c.startswith("ours") else "tab:gray" for c in present]
        axes.barh(list(present), list(present.values()), color=colours)
        axes.invert_yaxis()
        axes.set(xlabel="tokens a second", title=title)


PLOTS: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "operators": operators,
    "training": training,
}


def draw(path: Path, record: Mapping[str, Any], folder: Path) -> None:
    """The plot of one result file into ``folder``, the same bytes each time."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "beft", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        PLOTS[path.stem](figure, record)
        with whole_file(folder / name(path)) as temporary:
            metadata = {"Date": None, "Description": source(path)}
            figure.savefig(temporary, format="svg", metadata=metadata)
