"""The pictures. matplotlib is loaded here alone, and only when one is drawn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from beft_ext.errors import BeftError, BeftWarning
from beft_ext.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Outcome(Protocol):
    """What a picture of methods asks of each of them."""

    method: str
    metrics: Mapping[str, float]
    parameters: int
    failure: str | None


class PlotError(BeftError, RuntimeError):
    """matplotlib is missing, or there is nothing to draw."""


def draw(picture: Callable[..., None], *arguments: object) -> None:
    """Draw ``picture(*arguments)``, or say in a BeftWarning why not: it is no result."""
    try:
        picture(*arguments)
    except PlotError as error:
        warnings.warn(f"no picture was drawn: {error}", BeftWarning, stacklevel=2)


def heatmap(per_layer: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Term x layer picture of one score; NaN cells stay grey. Raises PlotError."""
    if not per_layer:
        raise PlotError(f"there are no scores '{title}' by layer to draw")
    layers = max(len(row) for row in per_layer.values())
    cells = [[*row, *[math.nan] * (layers - len(row))] for row in per_layer.values()]
    figure = _figure(2.5 + 0.5 * layers, 1.2 + 0.42 * len(cells))
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    image = axes.imshow(cells, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(cells)), list(per_layer))
    axes.set_xticks(range(layers), [str(i) for i in range(layers)])
    axes.set_xlabel("layer")
    axes.set_title(title)
    figure.colorbar(image)
    figure.savefig(path, dpi=150, format="png")


def learning_curve(history: Sequence[Mapping[str, float]], metric: str, path: Path) -> None:
    """Training loss and validation metric over epochs, from ``tune``'s history. A whole file."""
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    epochs = [record["epoch"] for record in history]
    lines = axes.plot(epochs, [r["loss"] for r in history], color="C0", label="training loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    other = axes.twinx()
    lines += other.plot(epochs, [r[metric] for r in history], color="C1", label=metric)
    other.set_ylabel(metric)
    axes.legend(handles=lines)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def methods(outcomes: Sequence[Outcome], metric: str, path: Path) -> None:
    """The metric of each method over what it trains: every seed a dot, the mean a line. A whole
    file. outcomes: of ``compare``."""
    names = list(dict.fromkeys(o.method for o in outcomes if o.failure is None))
    figure = _figure(7, 1.5 + 0.35 * len(names))
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        own = [o for o in outcomes if o.method == name and o.failure is None]
        values = [o.metrics[metric] for o in own]
        axes.plot(values, [place] * len(own), "o", color="C0", alpha=0.5)
        mean = sum(values) / len(values)
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color="C1")
    sizes = {o.method: o.parameters for o in outcomes if o.failure is None}
    axes.set_yticks(range(len(names)), [f"{n}\n{sizes[n]:,} trained" for n in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(metric)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except Exception as error:  # missing, or broken by another version of numpy
        raise PlotError("a plot needs matplotlib: pip install 'beft-ext[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
