"""The pictures. matplotlib is loaded here alone, and only when one is drawn."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from beft_ext.errors import BeftError, BeftWarning
from beft_ext.files import whole_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

# What a cell without a colour means, and how it is hatched.
HATCHES = {"dead": ("its gradient is zero", "////"), "undefined": ("no such score", "....")}
WIDE = 100.0  # a ratio beyond which colours go by the logarithm


class Outcome(Protocol):
    """What a picture of methods asks of each of them."""

    method: str
    metrics: Mapping[str, float]
    parameters: int
    failure: str | None


class PlotError(BeftError, RuntimeError):
    """matplotlib is missing, or there is nothing to draw."""


def draw(picture: Callable[..., None], *arguments: object, **options: object) -> None:
    """Draw ``picture(*arguments, **options)``, or say in a BeftWarning why not: it is no result."""
    try:
        picture(*arguments, **options)
    except PlotError as error:
        warnings.warn(f"no picture was drawn: {error}", BeftWarning, stacklevel=2)


def heatmap(
    per_layer: Mapping[str, Sequence[float | None]],
    title: str,
    path: Path,
    *,
    score: str | None = None,
    dead: Collection[str] = (),
) -> None:
    """Term x layer picture of one score.

    Args:
        per_layer: a row for each term. A layer that has none of the term is None and stays white;
            a value that is not defined is NaN, and hatched.
        title: says model, task and score.
        score: the score's name, beside its colours; by default ``title``.
        dead: terms that are hatched whatever their values.
    Raises:
        PlotError: there is nothing to draw, or matplotlib is missing.
    """
    layers = max((len(row) for row in per_layer.values()), default=0)
    if not layers:
        raise PlotError(f"there are no scores '{title}' by layer to draw")
    names = list(per_layer)
    hatched: dict[str, list[tuple[int, int]]] = {kind: [] for kind in HATCHES}
    cells = [[math.nan] * layers for _ in names]
    for place, name in enumerate(names):
        for layer, value in enumerate(per_layer[name]):
            if value is None:
                continue
            if name in dead or not math.isfinite(value):
                hatched["dead" if name in dead else "undefined"].append((layer, place))
            else:
                cells[place][layer] = value
    label = max(len(name) for name in names)
    width = 2.6 + 0.075 * label + layers * min(0.5, 16 / layers)
    figure = _figure(max(width, _title_width(title)), 1.6 + 0.42 * len(cells))
    axes = figure.add_subplot()
    values = [x for row in cells for x in row if not math.isnan(x)]
    image = axes.imshow(cells, aspect="auto", cmap="viridis", norm=_norm(values))
    _legend_below(figure, _hatch(axes, hatched))
    axes.set_yticks(range(len(cells)), names)
    every = 1 + layers // 33
    axes.set_xticks(range(0, layers, every), [str(i) for i in range(0, layers, every)])
    axes.set_xlabel("layer")
    axes.set_title(title)
    if values:
        figure.colorbar(image, label=score or title)
    figure.savefig(path, dpi=150, format="png")


def learning_curve(
    history: Sequence[Mapping[str, float]],
    metric: str | None,
    path: Path,
    *,
    title: str = "",
    beside: Mapping[str, float] | None = None,
    smaller: bool = False,
) -> None:
    """Training loss and validation metric over epochs, from ``tune``'s history. A whole file.

    Args:
        metric: its name in the history; None for the loss alone.
        beside: the metric of other answers by their names, as "before training"; a line each.
        smaller: the best epoch is that of the smallest metric.
    """
    figure = _figure(max(7, _title_width(title)), 4)
    axes = figure.add_subplot()
    epochs = [record["epoch"] for record in history]
    losses = [record["loss"] for record in history]
    lines = axes.plot(epochs, losses, color="C0", marker="o", ms=4, label="training loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss", color="C0")
    axes.set_xlim(0.5, max(epochs, default=1) + 0.5)
    axes.set_xticks(sorted({*epochs[:: 1 + len(epochs) // 20]}))
    axes.set_title(title)
    if metric is not None:
        other = axes.twinx()
        reached = [record[metric] for record in history]
        lines += other.plot(epochs, reached, color="C1", marker="s", ms=4, label=metric)
        best = (min if smaller else max)(range(len(reached)), key=reached.__getitem__)
        label = f"best: {reached[best]:.4g} in epoch {epochs[best]:g}"
        at = ([epochs[best]], [reached[best]])
        lines += other.plot(*at, "o", color="C3", ms=13, mfc="none", mew=2, label=label)
        for dashes, (name, value) in zip(itertools.cycle(["--", ":"]), (beside or {}).items()):
            label = f"{name}: {value:.4g}"
            lines.append(other.axhline(value, color="C1", ls=dashes, alpha=0.7, label=label))
        other.set_ylabel(metric, color="C1")
    _legend_below(figure, lines)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def methods(
    outcomes: Sequence[Outcome],
    metric: str,
    path: Path,
    *,
    title: str = "",
    chance: float | None = None,
    zero_shot: float | None = None,
) -> None:
    """The metric of each method over what it trains: every seed a dot, the mean a line, the
    standard deviation over seeds a bar. A whole file.

    Args:
        outcomes: of ``compare``.
        chance: the metric of a model that has learnt nothing; a line.
        zero_shot: the metric of the model as it is; a line.
    """
    fine = [o for o in outcomes if o.failure is None]
    names = list(dict.fromkeys(o.method for o in fine))
    label = max((len(name) for name in names), default=0)
    width = max(6.4 + 0.075 * label, _title_width(title))
    figure = _figure(width, 1.9 + 0.5 * len(names))
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        values = [o.metrics[metric] for o in fine if o.method == name]
        mean = statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.barh(place, 2 * spread, left=mean - spread, height=0.5, color="C0", alpha=0.2)
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color="C1", lw=2)
        axes.plot(values, _apart(place, len(values)), "o", color="C0", ms=5, alpha=0.8)
    lines = [
        axes.axvline(value, color="0.4", ls=dashes, label=f"{name}: {value:.4g}")
        for value, name, dashes in ((chance, "chance", ":"), (zero_shot, "zero-shot", "--"))
        if value is not None
    ]
    sizes = {o.method: o.parameters for o in fine}
    axes.set_yticks(range(len(names)), [f"{n}\n{sizes[n]:,} trained" for n in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"{metric}: a dot a seed, the mean, one standard deviation")
    axes.set_title(title)
    _legend_below(figure, lines)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _norm(values: Sequence[float]) -> Normalize | None:
    """Colours by the logarithm where values differ by orders of magnitude; None for their own."""
    from matplotlib.colors import LogNorm, SymLogNorm

    sizes = sorted(abs(x) for x in values if x)
    quarter = sizes[len(sizes) // 4] if sizes else 0.0
    if not sizes or sizes[-1] < WIDE * quarter:
        return None
    low, high = min(values), max(values)
    if low > 0:
        return LogNorm(low, high)
    # Linear around zero, below the quarter.
    return SymLogNorm(max(quarter, sizes[-1] / 1e4), vmin=low, vmax=high)


def _hatch(axes: Axes, hatched: Mapping[str, Sequence[tuple[int, int]]]) -> list[Artist]:
    """Grey hatched cells; returns what a legend shows of them."""
    from matplotlib.patches import Patch, Rectangle

    shown: list[Artist] = []
    for kind, places in hatched.items():
        meaning, hatch = HATCHES[kind]
        style: dict[str, Any] = {"facecolor": "0.88", "edgecolor": "0.45", "hatch": hatch, "lw": 0}
        for x, y in places:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **style))
        if places:
            shown.append(Patch(**style, label=f"{kind}: {meaning}"))
    return shown


def _legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False
        )


def _apart(place: int, count: int) -> list[float]:
    """Heights of the seeds' dots around ``place``, so that equal ones do not hide each other."""
    step = min(0.1, 0.4 / max(1, count - 1))
    return [place + step * (i - (count - 1) / 2) for i in range(count)]


def title_of(model: str, *more: str | None) -> str:
    """The end of a model's name or folder, and what else there is to say, for a title."""
    return ", ".join(filter(None, ("/".join(Path(model).parts[-2:]), *more)))


def _title_width(title: str) -> float:
    """Inches that the longest line of a title takes."""
    return 0.6 + 0.105 * max(map(len, title.split("\n")))


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except Exception as error:  # missing, or broken by another version of numpy
        raise PlotError("a plot needs matplotlib: pip install 'beft-ext[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
