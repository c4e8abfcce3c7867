"""The scores of one bias: pure functions, float64 inside. Definitions: docs/definitions.md."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = ("beft", "magnitude", "fisher", "example_fisher", "snr")


def beft_score(initial: Tensor, current: Tensor) -> float:
    """One minus the projection of the shorter vector on the longer.

    initial, current: ``(H,)``, any float dtype; summed in float64.
    0 for no change, above 1 for an angle above 90 degrees; NaN where either vector is zero.
    Source: Huang et al. 2025 (arXiv 2509.15974), the bias-efficient score.
    """
    b0, b = initial.double(), current.double()
    norm_sq = torch.maximum(b0.dot(b0), b.dot(b))
    if not bool(b0.any()) or not bool(b.any()):
        return float("nan")
    return float(1 - b.dot(b0) / norm_sq)


def magnitude(initial: Tensor, current: Tensor) -> float:
    """Mean absolute change of an element; initial, current: ``(H,)``. Source: BitFit."""
    return float((current.double() - initial.double()).abs().mean())


def fisher(grad_sum_sq: Tensor, count: int) -> float:
    """Mean over elements of ``(1/count) sum g^2``; NaN where count is 0.

    grad_sum_sq: ``(H,)``. With per-example gradients and count N this is the empirical Fisher;
    with clipped batch gradients and the number of batches, the one of the authors' code.
    """
    return float(grad_sum_sq.double().mean() / count) if count else float("nan")


def signal_to_noise(grad_sum: Tensor, grad_sum_sq: Tensor, count: int) -> float:
    """``|mean g|^2 / tr Var(g) - 1/N`` of the per-example gradients; NaN where no noise was seen.

    The mean over N examples of pure noise has the squared length ``tr Var(g) / N``. This floor is
    taken off, so that noise scores zero on average; a single score may lie below.
    grad_sum, grad_sum_sq: ``(H,)`` sums of ``g_i`` and ``g_i^2`` over ``count`` examples.
    """
    if count < 2:
        return float("nan")
    mean = grad_sum.double() / count
    signal = float(mean.dot(mean))
    noise = float((grad_sum_sq.double() - count * mean.square()).clamp(min=0).sum()) / (count - 1)
    return signal / noise - 1 / count if noise > 0 else float("nan")
