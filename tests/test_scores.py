"""The scores against their formulas written out in numpy."""

import math

import numpy as np
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from beft_ext import scores

VECTORS = arrays(np.float64, 5, elements=st.floats(-10, 10, allow_subnormal=False))


@given(VECTORS, VECTORS)
def test_beft_is_one_minus_the_projection_on_the_longer(b0, b):
    got = scores.beft_score(torch.from_numpy(b0), torch.from_numpy(b))
    longer = max(np.linalg.norm(b0), np.linalg.norm(b))
    if not b0.any() or not b.any():
        assert math.isnan(got)
    elif longer > 1e-100:
        assert abs(got - (1 - sum(b / longer * (b0 / longer)))) < 1e-12


def test_no_change_scores_zero_and_opposite_two():
    b = torch.tensor([3.0, -4.0])
    assert scores.beft_score(b, b) == 0
    assert scores.beft_score(b, -b) == 2
    assert scores.magnitude(b, -b) == 7


def test_fisher_and_signal_to_noise_of_known_gradients():
    g = torch.randn(50, 3, dtype=torch.float64) + 1
    total, squares = g.sum(0), g.square().sum(0)
    assert math.isclose(scores.fisher(squares, 50), float(g.square().mean()))
    want = g.mean(0).square().sum() / g.var(0).sum() - 1 / 50
    assert math.isclose(scores.signal_to_noise(total, squares, 50), float(want), rel_tol=1e-9)
    assert math.isnan(scores.fisher(squares, 0))


def test_noise_alone_scores_zero_on_average():
    g = torch.randn(300, 10, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [scores.signal_to_noise(d.sum(0), d.square().sum(0), 10) for d in g]
    # 18,000 squares average to their mean within 1 %, of a floor of 1/10.
    assert abs(np.mean(found)) < 0.01 / 10 and abs(np.mean(found) + 1 / 10) > 0.09


def test_the_longer_of_two_vectors_divides():
    b0 = torch.tensor([3.0, 4.0])
    assert scores.beft_score(b0, 2 * b0) == scores.beft_score(2 * b0, b0) == 0.5


def test_a_single_example_has_no_noise():
    g = torch.ones(3)
    assert math.isnan(scores.signal_to_noise(g, g, 1))
    assert math.isnan(scores.signal_to_noise(2 * g, 2 * g, 2))


def test_half_precision_is_summed_in_double():
    """Squares of these, and their difference, are beyond what fp16 can hold."""
    b0, b = torch.tensor([6e4, 3.0]), torch.tensor([-6e4, 1e-3])
    half = b0.half(), b.half()
    for score in (scores.beft_score, scores.magnitude):
        assert score(*half) == score(*(x.double() for x in half))
    assert scores.fisher(half[0], 2) == float(half[0].double().sum()) / 4
    assert scores.magnitude(b0, b) == (12e4 + (3 - float(b[1]))) / 2


def test_what_rounding_leaves_below_zero_is_no_noise():
    total, squares = torch.tensor([2.0, 2.0]), torch.tensor([1.9, 4.0])
    # Of two examples with mean 1: no noise in the first element, 2 in the second.
    assert scores.signal_to_noise(total, squares, 2) == 2 / 2 - 1 / 2
