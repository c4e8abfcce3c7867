"""The pictures hold the numbers that they were given, and one that cannot be drawn is no error."""

import math

import numpy as np
import pytest

from beft_ext import plots
from beft_ext.commands.comparison import Outcome
from beft_ext.errors import BeftWarning

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture
def drawn(monkeypatch):
    """The figures, as matplotlib holds them."""
    figures, make = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    return figures


def test_a_heatmap_has_a_row_a_term_and_grey_where_nothing_is_known(drawn, tmp_path):
    plots.heatmap({"query": [0.1, math.nan, 0.3], "cross_key": [0.4]}, "beft", tmp_path / "x")
    axes, bar = drawn[0].axes
    (image,) = axes.get_images()
    cells = image.get_array()
    assert cells.shape == (2, 3) and cells.mask.tolist() == [[0, 1, 0], [0, 1, 1]]
    assert cells.compressed().tolist() == [0.1, 0.3, 0.4]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["query", "cross_key"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]
    assert axes.get_title() == "beft" and axes.get_facecolor()[:3] == (0.85,) * 3
    assert bar.get_ylim() == (0.1, 0.4)
    assert (tmp_path / "x").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(plots.PlotError, match="no scores 'snr' by layer"):
        plots.heatmap({}, "snr", tmp_path / "y")


def test_a_learning_curve_is_the_loss_and_the_metric_over_epochs(drawn, tmp_path):
    history = [{"epoch": i, "loss": 1 / i, "f1": i / 4} for i in (1, 2, 3)]
    plots.learning_curve(history, "f1", tmp_path / "curve.png")
    left, right = drawn[0].axes
    for axes, values in ((left, [1, 1 / 2, 1 / 3]), (right, [1 / 4, 2 / 4, 3 / 4])):
        (line,) = axes.get_lines()
        assert np.array_equal(line.get_xydata(), np.c_[[1, 2, 3], values])
    assert (left.get_ylabel(), right.get_ylabel()) == ("training loss", "f1")
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["training loss", "f1"]
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_methods_are_a_dot_a_seed_and_a_line_at_the_mean(drawn, tmp_path):
    found = [Outcome("beft", s, {"f1": v}, parameters=1234) for s, v in enumerate((0.5, 0.75))]
    found += [Outcome("lora", 0, {"f1": 0.25}, parameters=99), Outcome("full", 0, {}, failure="x")]
    found.append(Outcome("lora", 1, {}, failure="no memory"))
    plots.methods(found, "f1", tmp_path / "methods.png")
    (axes,) = drawn[0].axes
    lines = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert lines[0] == [[0.5, 0], [0.75, 0]] and lines[2] == [[0.25, 1]]
    for place, mean in ((0, 0.625), (1, 0.25)):
        assert [x for x, _ in lines[2 * place + 1]] == [mean, mean] and len(lines) == 4
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels == ["beft\n1,234 trained", "lora\n99 trained"]
    assert axes.yaxis_inverted() and axes.get_xlabel() == "f1"


def test_what_cannot_be_drawn_is_a_warning(tmp_path):
    with pytest.warns(BeftWarning, match="no picture was drawn: there are no scores 'beft'"):
        plots.draw(plots.heatmap, {}, "beft", tmp_path / "x")

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # a fault of ours is not hidden
        plots.draw(broken)
