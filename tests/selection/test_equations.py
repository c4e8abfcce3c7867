"""What examples ask of a term: on average the loss to second order, and errors that hold."""

from __future__ import annotations

import pytest
import torch

from beft_ext.gains import GainError, Gram, Regression, gain, lead
from beft_ext.selection.equations import CERTAIN, Equations, joined, number_of
from beft_ext.training.observed import Observed

DOUBLE = torch.float64


def classes(logits, right):
    return Observed.of_classes(torch.as_tensor(logits, dtype=DOUBLE), torch.as_tensor(right))


def gradients(logits, right, keys=None, seed=0, which=0):
    """Of the outputs with respect to the logits, ``(B, C)``, and the equations."""
    logits = torch.as_tensor(logits, dtype=DOUBLE).requires_grad_()
    found = Equations.of(classes(logits, right), keys or list(range(len(right))), seed, which)
    return torch.autograd.grad(found.output.sum(), logits)[0], found


def curvature(p):
    return torch.diag(p) - torch.outer(p, p)


@pytest.mark.parametrize("right", [0, 1])
def test_of_two_classes_the_equation_is_the_whole_second_order(right):
    logits = torch.tensor([[0.3, -1.1]], dtype=DOUBLE)
    assert number_of(classes(logits, [right])) == 1
    rows, asked = gradients(logits, [right])
    p = logits.softmax(-1)[0]
    torch.testing.assert_close(torch.outer(rows[0], rows[0]), curvature(p))
    residual = p - torch.eye(2, dtype=DOUBLE)[right]
    torch.testing.assert_close(rows[0] * asked.targets, residual)
    torch.testing.assert_close(asked.prior, rows[:, 1:])


@pytest.mark.parametrize("count", [3, 6])
def test_of_more_classes_both_equations_are_it_on_average(count):
    """The loss's gradient exactly; its second derivative over many draws, within four standard
    errors, and exactly for three classes, where there is nothing to draw but a sign."""
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(1, count, generator=generator, dtype=DOUBLE)
    draws, right = 20_000, count - 1
    p = logits.softmax(-1)[0]
    assert number_of(classes(logits, [right])) == 2
    (along, first), (across, second) = (
        gradients(logits.expand(draws, -1), [right] * draws, which=which) for which in (0, 1)
    )
    residual = p - torch.eye(count, dtype=DOUBLE)[right]
    torch.testing.assert_close(along[0] * first.targets[0], residual)
    assert first.targets[0].square() == pytest.approx(float((1 - p[right]) / p[right]))
    assert not second.targets.any()
    found = sum(rows[:, :, None] * rows[:, None] for rows in (along, across))
    off = (found.mean(0) - curvature(p)).abs()
    assert (off <= 4 * found.std(0) / draws**0.5 + 1e-12).all()
    assert count > 3 or float(found.std(0).max()) < 1e-12
    torch.testing.assert_close(first.prior, along[:, 1:])
    torch.testing.assert_close(second.prior, across[:, 1:])


def test_an_equation_is_the_examples_own_wherever_it_is_read():
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    right, keys = [0, 1, 2, 3] * 2, [bytes([i]) for i in range(8)]
    whole, _ = gradients(logits, right, keys, which=1)
    half, _ = gradients(logits[4:], right[4:], keys[4:], which=1)
    assert torch.equal(whole[4:], half)
    other, _ = gradients(logits, right, keys, seed=1, which=1)
    assert not torch.equal(whole, other)


def test_no_class_is_more_certain_than_counts():
    _, asked = gradients([[40.0, -40.0], [-40.0, 40.0]], [0, 0])
    most = ((1 - CERTAIN) / CERTAIN) ** 0.5
    assert asked.targets.tolist() == pytest.approx([1 / most, most])


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_impossible_or_has_no_label_asks_nothing(which):
    rows, asked = gradients([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]], [1, -100], which=which)
    assert rows.isfinite().all() and rows[0, 2] == 0 and not rows[1].any()
    assert asked.counts.tolist() == [1, 0] and not asked.prior[1].any()


def test_options_of_unlike_number_have_no_prior():
    parts = [gradients(torch.zeros(2, n), [0, 1])[1].kept() for n in (2, 3)]
    targets, prior, counts, right = joined(parts)
    assert len(targets) == len(counts) == 4 and prior.shape == (4, 0) and right is None
    targets, prior, counts, right = joined(parts[:1] * 2)
    assert prior.shape == (4, 1) and right.tolist() == [0, 1, 0, 1]


SHARES = torch.tensor([0.22, 0.22, 0.21, 0.18, 0.15, 0.02])  # one of six classes is rare
WIDTH, POOL, SIZE = 6, 2400, 100


def population(seed=0):
    """Rows of two terms, and what is to be explained: classes that lie apart in what the first
    term sees and, less so, in what the second sees."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.multinomial(SHARES, POOL, replacement=True, generator=generator)
    centers = torch.randn(2, len(SHARES), WIDTH, generator=generator, dtype=DOUBLE)
    noise = torch.randn(2, POOL, WIDTH, generator=generator, dtype=DOUBLE)
    seen = noise + centers[:, right] * torch.tensor([1.5, 0.8], dtype=DOUBLE)[:, None, None]
    both = [
        gradients(torch.zeros(POOL, len(SHARES)), right.tolist(), which=which) for which in (0, 1)
    ]
    asked = [torch.stack([getattr(e, n) for _, e in both], 1) for n in ("targets", "prior")]
    grams = []
    for features in seen:
        own = torch.stack([(g[:, :, None] * features[:, None]).flatten(1) for g, _ in both], 1)
        grams.append(own.flatten(0, 1) @ own.flatten(0, 1).T)
    targets, prior = (t.flatten(0, 1) for t in asked)
    return grams, Regression(targets, prior, torch.arange(POOL).repeat_interleave(2))


def test_errors_of_six_classes_cover_what_is_true():
    """True is the mean over disjoint draws. A class of two rows in a hundred must not rule."""
    grams, regression = population()
    leads = []
    for at in range(0, POOL, SIZE):
        rows = torch.arange(2 * at, 2 * (at + SIZE))
        own = regression.part(rows)
        first, second = (gain(Gram.of(k[rows][:, rows]), own) for k in grams)
        leads.append(lead(first, second))
    true = sum(ahead for ahead, _ in leads) / len(leads)
    assert true > 0.05
    covered = sum(abs(ahead - true) <= 1.96 * error for ahead, error in leads) / len(leads)
    assert covered >= 0.95 - 2 * (0.95 * 0.05 / len(leads)) ** 0.5


def test_a_class_that_is_missing_leaves_something_to_explain():
    """Of no draw is the prior the whole answer, though it may never have seen a class."""
    _, regression = population()
    try:
        shares = [
            float(own.prior_errors.square().sum() / own.targets.square().sum())
            for at in range(0, POOL, SIZE)
            for own in [regression.part(torch.arange(2 * at, 2 * (at + SIZE)))]
        ]
    except GainError as error:
        pytest.fail(str(error))
    assert min(shares) > 0.5 and max(shares) < 2
