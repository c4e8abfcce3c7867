"""The pictures hold the numbers that they were given, and one that cannot be drawn is no error."""

import itertools
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


def legend(figure):
    return [t.get_text() for own in figure.legends for t in own.get_texts()]


def test_a_heatmap_is_a_row_a_term_and_hatched_where_there_is_no_score(drawn, tmp_path):
    rows = {"query": [0.1, math.nan, 0.3], "cross_attention_output@1": [None, 0.4], "key": [0, 1]}
    plots.heatmap(rows, "tiny, own.csv: beft", tmp_path / "x", score="beft", dead=["key"])
    axes, bar = drawn[0].axes
    (image,) = axes.get_images()
    cells = image.get_array()
    assert cells.mask.tolist() == [[0, 1, 0], [1, 0, 1], [1, 1, 1]]
    assert cells.compressed().tolist() == [0.1, 0.3, 0.4]
    hatched = {(p.get_hatch(), p.get_xy()) for p in axes.patches}
    dead, undefined = (plots.HATCHES[kind][1] for kind in ("dead", "undefined"))
    assert hatched == {(undefined, (0.5, -0.5)), (dead, (-0.5, 1.5)), (dead, (0.5, 1.5))}
    assert legend(drawn[0]) == ["dead: its gradient is zero", "undefined: no such score"]
    assert [t.get_text() for t in axes.get_yticklabels()] == list(rows)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]
    assert axes.get_title() == "tiny, own.csv: beft" and bar.get_ylabel() == "beft"
    assert bar.get_ylim() == (0.1, 0.4)
    assert (tmp_path / "x").read_bytes()[:4] == b"\x89PNG"
    plots.heatmap({"key": [math.nan]}, "beft", tmp_path / "y", dead=["key"])
    assert len(drawn[1].axes) == 1, "nothing has a colour"
    for nothing in ({}, {"key": []}):
        with pytest.raises(plots.PlotError, match="no scores 'snr' by layer"):
            plots.heatmap(nothing, "snr", tmp_path / "z")


def test_values_that_differ_by_orders_of_magnitude_stay_apart(drawn, tmp_path):
    """By their colours: of neighbours in size none is nearer than a twentieth of the scale."""
    kinds = {
        "positive": [1e-9, 1e-7, 1e-5, 1e-3, 1e-1],
        "of both signs": [-1e1, -1e-1, -1e-3, 0.0, 1e-3, 1e-1, 1e1],
        "alike": [-0.05, 0.0, 0.15, 0.3, 0.4],
    }
    for values in kinds.values():
        plots.heatmap({"value": values}, "snr", tmp_path / "x")
    scales = [figure.axes[0].get_images()[0].norm for figure in drawn]
    for norm, values in zip(scales, kinds.values(), strict=True):
        places = np.asarray(norm(values))
        assert places[0] == 0 and places[-1] == 1 and np.diff(places).min() > 0.05
    assert [type(norm).__name__ for norm in scales] == ["LogNorm", "SymLogNorm", "Normalize"]


def test_names_titles_and_many_layers_fit(drawn, tmp_path):
    rows = {"cross_attention_output@10-79": [0.5] * 80, "value": [0.1] * 80}
    title = "a title that is longer than a picture of two layers would be, with its task: gain"
    plots.heatmap(rows, title, tmp_path / "x")
    plots.heatmap({n: row[:2] for n, row in rows.items()}, title, tmp_path / "y")
    for figure in drawn:
        figure.canvas.draw()
        edges = figure.bbox
        texts = [figure.axes[0].title, *figure.axes[0].get_yticklabels()]
        boxes = [text.get_window_extent() for text in texts]
        assert min(box.x0 for box in boxes) >= edges.x0 and max(b.x1 for b in boxes) <= edges.x1
        labels = [t.get_window_extent() for t in figure.axes[0].get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(labels))
    assert drawn[0].get_figwidth() < 22


def test_a_learning_curve_is_the_loss_and_the_metric_over_epochs(drawn, tmp_path):
    history = [{"epoch": i, "loss": 1 / i, "f1": f} for i, f in ((1, 0.25), (2, 0.75), (3, 0.5))]
    told = {"title": "tiny, own.csv: value"}
    told["beside"] = {"before training": 0.125, "always 'praise'": 0.375}
    plots.learning_curve(history, "f1", tmp_path / "curve.png", **told)
    left, right = drawn[0].axes
    assert left.get_title() == told["title"] and left.get_legend() is right.get_legend() is None
    (loss,) = left.get_lines()
    metric, best, *lines = right.get_lines()
    assert np.array_equal(loss.get_xydata(), [[1, 1], [2, 1 / 2], [3, 1 / 3]])
    assert np.array_equal(metric.get_xydata(), [[1, 0.25], [2, 0.75], [3, 0.5]])
    assert "None" not in (loss.get_marker(), metric.get_marker())
    assert best.get_xydata().tolist() == [[2, 0.75]]
    assert [line.get_ydata()[0] for line in lines] == [0.125, 0.375]
    assert (left.get_ylabel(), right.get_ylabel()) == ("training loss", "f1")
    ends = ["best: 0.75 in epoch 2", "before training: 0.125", "always 'praise': 0.375"]
    assert legend(drawn[0]) == ["training loss", "f1", *ends]
    assert [t.get_text() for t in left.get_xticklabels()] == ["1", "2", "3"]
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]
    plots.learning_curve(history, "f1", tmp_path / "curve.png", smaller=True)
    assert legend(drawn[1])[2:] == ["best: 0.25 in epoch 1"]
    plots.learning_curve(history[:1], None, tmp_path / "curve.png")
    assert legend(drawn[2]) == ["training loss"] and len(drawn[2].axes) == 1


def test_methods_are_a_dot_a_seed_the_mean_and_their_spread(drawn, tmp_path):
    found = [Outcome("beft", s, {"f1": v}, parameters=1234) for s, v in enumerate((0.5, 0.75))]
    found += [Outcome("lora", 0, {"f1": 0.25}, parameters=99), Outcome("full", 0, {}, failure="x")]
    found.append(Outcome("lora", 1, {}, failure="no memory"))
    told = {"title": "tiny, own.csv", "chance": 0.5, "zero_shot": 0.375}
    plots.methods(found, "f1", tmp_path / "methods.png", **told)
    (axes,) = drawn[0].axes
    first, dots, second, dot, *lines = (line.get_xydata().tolist() for line in axes.get_lines())
    assert [x for x, _ in dots] == [0.5, 0.75] and dot == [[0.25, 1]]
    heights = [y for _, y in dots]
    assert -0.3 < heights[0] < 0 < heights[1] < 0.3
    assert [x for x, _ in first] == [0.625, 0.625] and [x for x, _ in second] == [0.25, 0.25]
    spread = np.std([0.5, 0.75], ddof=1)
    wide, none = axes.patches
    assert np.allclose([wide.get_x(), wide.get_width()], [0.625 - spread, 2 * spread])
    assert none.get_width() == 0
    assert [line[0][0] for line in lines] == [0.5, 0.375]
    assert legend(drawn[0]) == ["chance: 0.5", "zero-shot: 0.375"]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels == ["beft\n1,234 trained", "lora\n99 trained"]
    assert axes.yaxis_inverted() and axes.get_xlabel().startswith("f1: ")
    assert axes.get_title() == "tiny, own.csv"
    plots.methods(found, "f1", tmp_path / "methods.png")
    assert not legend(drawn[1])


def test_what_cannot_be_drawn_is_a_warning(tmp_path):
    with pytest.warns(BeftWarning, match="no picture was drawn: there are no scores 'beft'"):
        plots.draw(plots.heatmap, {}, "beft", tmp_path / "x")

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # a fault of ours is not hidden
        plots.draw(broken)
