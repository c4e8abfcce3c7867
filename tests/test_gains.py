"""The gain's closed forms, against literal refits without the examples, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from beft_ext.gains import (
    RIDGES,
    GainError,
    Gram,
    Regression,
    beyond_chance,
    gain,
    lead,
    learning_curve,
    together,
)


def made(count=20, width=7, classes=3, groups=None, seed=0, signal=0.0):
    """A regression and the rows of its term."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    labels = torch.arange(count) % classes
    prior = torch.full((count, classes), 1 / classes, dtype=torch.float64)
    prior[torch.arange(count), labels] -= 1
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    targets = 1 + noise + signal * rows[:, 0]
    groups = torch.arange(count) if groups is None else groups
    return Regression(targets, prior[:, 1:], groups), rows


def refitted(regression, rows, ridge, without):
    """Errors of the rows in ``without``, of a ridge regression that never saw them."""
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[without] = False
    free = regression.prior.shape[1]
    design = torch.cat([regression.prior, rows], dim=1)
    penalty = torch.diag(torch.tensor([0.0] * free + [ridge] * rows.shape[1]).double())
    normal = design[kept].T @ design[kept] + penalty
    weights = torch.linalg.lstsq(normal, design[kept].T @ regression.targets[kept]).solution
    return regression.targets[without] - design[without] @ weights


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 30), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_errors_are_those_of_literal_refits(count, width, classes, seed, grouped):
    groups = torch.arange(count) // 2 if grouped else None
    regression, rows = made(count, width, classes, groups, seed)
    if any(
        len(torch.unique(torch.arange(count)[regression.groups != g] % classes)) < classes
        for g in regression.groups.unique().tolist()
    ):
        return  # a class that lies in one group only is not told by the others
    gram = Gram.of(rows @ rows.T)
    found = gram.left(regression, regression.targets[:, None])[1][..., 0]
    for i in (0, 9, 21):
        ridge = float(gram.ridges[i])
        for block in regression.blocks[:5]:
            literal = refitted(regression, rows, ridge, block)
            scale = float(regression.targets.abs().max())
            torch.testing.assert_close(found[i, block], literal, rtol=1e-5, atol=1e-6 * scale)


def test_the_gain_is_the_share_of_squared_errors_at_the_best_ridge():
    regression, rows = made(signal=2.0)
    ridges = (RIDGES * rows.square().sum() / len(rows)).tolist()
    before = torch.cat([refitted(regression, rows[:, :0], 1.0, b) for b in regression.blocks])
    shares = [
        1 - sum(float(refitted(regression, rows, r, b).square()) for b in regression.blocks)
        / float(before.square().sum())
        for r in ridges
    ]  # fmt: skip
    found = gain(Gram.of(rows @ rows.T), regression)
    assert found.value == pytest.approx(max(shares), rel=1e-7)
    assert found.ridge == pytest.approx(ridges[shares.index(max(shares))])


def test_the_step_is_that_of_the_ridge_regression():
    regression, rows = made(signal=2.0)
    found = gain(Gram.of(rows @ rows.T), regression)
    design = torch.cat([regression.prior, rows], dim=1)
    penalty = torch.diag(torch.tensor([0.0] * 2 + [found.ridge] * rows.shape[1]).double())
    weights = torch.linalg.solve(design.T @ design + penalty, design.T @ regression.targets)
    assert found.step == pytest.approx(float(weights[2:].norm()))


def test_noise_gains_little_and_signal_much():
    noise, rows = made(count=100, width=50)
    signal, _ = made(count=100, width=50, signal=3.0)
    gram = Gram.of(rows @ rows.T)
    assert gain(gram, noise).value < 0.1 and gain(gram, signal).value > 0.5
    for regression, low, high in ((noise, 0.05, 1.0), (signal, 0.0, 0.011)):
        found = gain(gram, regression)
        p = beyond_chance({"a": gram}, {"a": found}, regression, flips=99, seed=0)["a"]
        assert low <= p <= high


def test_a_term_without_effect_gains_nothing():
    regression, rows = made()
    assert gain(Gram.of(torch.zeros(len(rows), len(rows))), regression).value == 0


def test_twins_left_out_together_are_no_gain():
    twice = torch.arange(20).repeat(2)
    one, rows = made(count=20, width=30)
    both = Regression(one.targets[twice], one.prior[twice], torch.arange(40))
    gram = Gram.of(rows[twice] @ rows[twice].T)
    assert gain(gram, both).value > 0.9  # each twin tells the other
    apart = Regression(one.targets[twice], one.prior[twice], twice)
    assert gain(gram, apart).value < 0.3


def test_lead_is_the_difference_and_antisymmetric():
    regression, rows = made(signal=1.0, count=60)
    first, rival = (gain(Gram.of(r @ r.T), regression) for r in (rows[:, :3], rows[:, 3:]))
    difference, error = lead(first, rival)
    assert difference == pytest.approx(first.value - rival.value)
    assert lead(rival, first) == pytest.approx((-difference, error))
    d = rival.squares[:, 0] - first.squares[:, 0]
    variance = float(d.var()) * (1 / 60 + 1 / 59)
    assert error == pytest.approx(60 * math.sqrt(variance) / float(first.squares[:, 1].sum()))


def test_flips_keep_their_share_under_noise():
    below = 0
    for seed in range(60):
        regression, rows = made(count=30, width=10, seed=seed)
        gram = Gram.of(rows @ rows.T)
        found = {"a": gain(gram, regression)}
        below += beyond_chance({"a": gram}, found, regression, flips=39, seed=seed)["a"] <= 0.1
    assert below <= 6 + 3 * math.sqrt(60 * 0.1 * 0.9)


def test_a_learning_curve_ends_where_all_examples_count():
    regression, rows = made(count=80, signal=2.0)
    matrix = rows @ rows.T
    curve = learning_curve(matrix, regression, (4, 2, 1), seed=0)
    assert list(curve) == [20, 40, 80]
    assert curve[80] == pytest.approx(gain(Gram.of(matrix), regression).value)


def test_parts_of_fewer_groups_than_parts_are_left_out_of_the_curve():
    regression, rows = made(count=12, groups=torch.arange(12) % 3)
    assert list(learning_curve(rows @ rows.T, regression, (4, 2, 1), seed=0)) == [3]


def test_what_shares_a_key_is_together_and_what_others_link():
    assert together(["a", "b", "a", "c"]).tolist() == [0, 1, 0, 2]
    # The first and the last text are equal; the users 1 and 2 have them.
    texts, users = ["a", "b", "c", "d", "a"], [1, 1, 2, None, 2]
    assert together(texts, users).tolist() == [0, 0, 0, 1, 0]
    # A text is no user, and no user is not a user.
    assert together([1, 2, 3], [2, None, None]).tolist() == [0, 1, 2]


def test_a_whole_group_is_left_out_as_literal_refits_do():
    """Groups of unlike size, some of them linked by equal texts."""
    users = [0, 0, 1, 1, 1, 2, None, 3, None, 3, *range(4, 14), *range(4, 14)]
    texts = [*range(28), 2, 27]
    groups = together(texts, users)
    assert max(groups.unique(return_counts=True)[1]) == 5  # user 1, and who wrote the same
    regression, rows = made(count=30, width=5, groups=groups, signal=1.0)
    gram = Gram.of(rows @ rows.T)
    found = gram.left(regression, regression.targets[:, None])[1][..., 0]
    for block in regression.blocks:
        for i in (0, 11, 21):
            literal = refitted(regression, rows, float(gram.ridges[i]), block)
            torch.testing.assert_close(found[i, block], literal, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 2, "classes": 1}, "at least 3 examples"),
        ({"groups": torch.zeros(20, dtype=torch.int64)}, "at least 3 examples"),
    ],
)
def test_too_few_examples_are_named(change, message):
    with pytest.raises(GainError, match=message):
        made(**change)


def test_equal_losses_leave_nothing_to_explain():
    prior = torch.ones(10, 1, dtype=torch.float64)
    with pytest.raises(GainError, match="all labels the same"):
        Regression(torch.full((10,), 0.7), prior, torch.arange(10))
