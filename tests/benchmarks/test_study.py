"""The study: a cell is measured once, and what a pick loses is judged by rows that did not name
the best term."""

import itertools
from unittest import mock

import pytest
import torch

pytestmark = pytest.mark.usefixtures("benchmarks_on_the_path")
PLACE = {"model": "m", "task": "a", "size": 3, "draw": 0}


def half(accuracy):
    return {"accuracy": accuracy, "loss": 1.0}


def reached(**terms):
    """By term, at one rate, the accuracy on each half."""
    return {"reached": {t: {"0.01": [half(a) for a in pair]} for t, pair in terms.items()}}


def gains(rows, targets, elements):
    from beft_ext.gains import Regression
    from beft_ext.selection import Gains
    from beft_ext.selection.evidence import Evidence

    count = len(targets)
    regression = Regression(targets, targets.new_zeros(count, 0), torch.arange(count))
    evidence = Evidence(regression, regression.groups, {"x": {(0, 0): rows @ rows.T}}, {}, None)
    return mock.Mock(spec=Gains, evidence=evidence, ranking=["x"], elements={"x": elements})


def test_the_study_says_what_was_measured():
    import study_sure
    from study import finished
    from study_page import OUT, page

    assert OUT.read_text(encoding="utf-8") == page(finished(), study_sure.results())


def test_a_cell_of_the_study_gets_the_parts_that_it_lacks_and_no_other(monkeypatch, tmp_path):
    import study

    known = {**PLACE, "reached": {"value": 0.5}}
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.jsonl")
    monkeypatch.setattr(study, "Cell", mock.MagicMock())
    parts = {"gain": lambda _, r: f"beside {r['reached']}", "reached": None}
    monkeypatch.setattr(study, "PARTS", parts)
    study.keep({**known, "draw": 1})
    study.keep(known)
    study.complete(known, None)
    found = study.results()
    assert [r["draw"] for r in found] == [1, 0] and found[0] == {**known, "draw": 1}
    assert found[1] == {**known, "gain": "beside {'value': 0.5}"}
    study.complete(found[1], None)
    assert study.Cell.call_count == 1


def test_the_study_ranks_as_scipy_does():
    from scipy.stats import spearmanr
    from study_ways import rank_correlation

    a, b = {"x": 0.1, "y": 0.1, "z": 3.0, "w": -1.0}, {"w": 2, "x": 5, "y": 1, "z": 5, "v": 9}
    want = spearmanr(list(a.values()), [b[t] for t in a]).statistic
    assert rank_correlation(a, b) == pytest.approx(want)
    assert rank_correlation({"x": 1.0, "y": 1.0}, {"x": 1.0, "y": 2.0}) == 0


def test_what_a_pick_loses_is_told_by_rows_that_did_not_name_the_best():
    from study_ways import lost

    lucky = reached(a=(0.9, 0.5), b=(0.6, 0.7))  # each half names another term
    assert lost(lucky, ["a"]) == pytest.approx(100 * ((0.6 - 0.9) + (0.5 - 0.5)) / 2)
    assert lost(lucky, ["a", "b"]) == pytest.approx(100 * ((0.6 - 0.75) + (0.5 - 0.6)) / 2)
    clear = reached(a=(0.9, 0.9), b=(0.6, 0.7))
    assert lost(clear, ["a"]) == 0
    assert lost(clear, ["b"]) == pytest.approx(100 * (0.3 + 0.2) / 2)


def test_the_rate_of_a_term_is_named_by_the_other_half():
    from study_ways import reached as told

    rates = {"0.1": [half(0.9), half(0.1)], "0.2": [half(0.3), half(0.8)]}
    assert told({"reached": {"a": rates}}) == {"a": pytest.approx((0.3 + 0.1) / 2)}


def test_the_studys_prior_never_saw_the_task():
    from study_prior import LARGE
    from study_ways import prior_without

    def cell(task, size, model="m", **values):
        return {**PLACE, "model": model, "task": task, "size": size, "gain": {"values": values}}

    others = [cell("a", LARGE, x=0.3, y=0.1), cell("b", LARGE, x=0.5, y=0.1)]
    own = [cell("c", LARGE, x=0.0, y=9.0), cell("a", LARGE // 3, x=0.0, y=9.0)]
    strange = [cell("a", LARGE, model="n", x=0.0, y=9.0)]
    found = prior_without([*own, *others, *strange], own[0])
    assert found.means == pytest.approx({"x": 0.15, "y": -0.15})


def test_the_prior_that_is_shipped_is_that_of_the_committed_cells():
    from study_prior import cells, fitted

    from beft_ext.selection.choice import PRIORS

    for family, prior in PRIORS.items():
        own = cells(family)
        means, spread = fitted(own)
        assert dict(prior.means) == means and prior.spread == spread
        assert prior.evidence.startswith(f"{len(own)} cells of " if own else "no study")
        assert not means or prior.first == next(iter(means))


def test_a_prior_is_fitted_to_tasks_whatever_number_of_cells_they_have():
    from study_prior import FEWEST, WIDEST, fitted

    def cell(task, x, y, draw=0):
        gain = {"values": {"x": x, "y": y}}
        return {**PLACE, "task": task, "draw": draw, "gain": gain}

    cells = [cell("a", 0.4, 0.0), cell("a", 0.2, 0.0, draw=1), cell("b", 0.5, 0.0)]
    assert fitted(cells) == ({"x": 0.2, "y": -0.2}, WIDEST)
    assert len({c["task"] for c in cells}) < FEWEST
    means, spread = fitted([*cells, cell("c", 0.2, 0.0)])
    assert means == {"x": 0.17, "y": -0.17}  # of 0.15, 0.25 and 0.1
    assert spread == pytest.approx((0.0058333 * 4 / 3) ** 0.5, abs=0.005)
    assert fitted([]) == ({}, WIDEST)


def test_what_folding_moves_and_reorders():
    from study_fold import moved, reordered

    line = {"whole": {"a": 0.3, "b": 0.2, "c": 0.1}, "folded": {"a": 0.31, "b": 0.12, "c": 0.13}}
    assert moved(line) == pytest.approx(0.08) and reordered(line) == pytest.approx(0.1)
    assert reordered({"whole": {"a": 0.3, "b": 0.2}, "folded": {"a": 0.2, "b": 0.1}}) == 0


def test_rivals_of_the_gain_are_told_from_the_gram_matrix_as_from_the_gradients():
    from rivals import alignment, gradient_norm, logme

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    targets = rows[:, 0] + torch.randn(30, generator=generator, dtype=torch.float64)
    found = gains(rows, targets, 5)
    length = float((rows.T @ targets / 30).norm())
    assert gradient_norm(found)["x"] == pytest.approx(length / 5**0.5)
    centred, y = rows - rows.mean(0), targets - targets.mean()
    pairs = itertools.product(range(30), repeat=2)
    likeness = torch.stack([(centred[i] @ centred[j]) for i, j in pairs]).view(30, 30)
    want = (likeness * torch.outer(y, y)).sum() / (likeness.norm() * torch.outer(y, y).norm())
    assert alignment(found)["x"] == pytest.approx(float(want))
    # No weight of the prior and of the noise makes the data more likely.
    unit = targets / targets.std()
    mean = (rows @ rows.T).trace() / 30

    def evidence(prior, noise):
        spread = noise * torch.eye(30, dtype=torch.float64) + prior * rows @ rows.T / mean
        flat = torch.distributions.MultivariateNormal(torch.zeros_like(unit), spread)
        return float(flat.log_prob(unit) / 30 + 0.5 * torch.log(torch.tensor(2 * torch.pi)))

    grid = torch.logspace(-3, 2, 40).tolist()
    best = max(evidence(a, b) for a, b in itertools.product(grid, grid))
    assert logme(found)["x"] == pytest.approx(best, abs=0.02)


def test_the_draws_of_one_shuffling_are_disjoint():
    from study_sure import draws

    found = [rows.tolist() for rows in draws(10, 3, 6)]
    assert len(found) == 6
    for shuffling in (found[:3], found[3:]):
        assert len({row for rows in shuffling for row in rows}) == 9
