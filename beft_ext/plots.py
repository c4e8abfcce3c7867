"""The pictures. matplotlib is loaded here alone, and only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path


class PlotError(RuntimeError):
    """matplotlib is missing."""


def heatmap(per_layer: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Term x layer picture of one score; NaN cells stay grey. Raises PlotError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("the heatmap needs matplotlib: pip install 'beft-ext[plots]'") from error
    layers = max(len(row) for row in per_layer.values())
    cells = [[*row, *[math.nan] * (layers - len(row))] for row in per_layer.values()]
    figure = Figure(figsize=(2.5 + 0.5 * layers, 1.2 + 0.42 * len(cells)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    image = axes.imshow(cells, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(cells)), list(per_layer))
    axes.set_xticks(range(layers), [str(i) for i in range(layers)])
    axes.set_xlabel("layer")
    axes.set_title(title)
    figure.colorbar(image)
    figure.savefig(path, dpi=150, format="png")
