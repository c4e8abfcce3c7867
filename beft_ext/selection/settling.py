"""Is the first of a ranking settled, or could other examples have put another term there?

The gradients of single examples tell how far chance carries a bias in a run. A mean over a batch
of B has the variance ``Var(g) / B``. AdamW divides each step by the gradient's root mean square.
So the share ``r = (Var / B) / (E[g]^2 + Var / B)`` of a step's variance is noise. Over the steps
``s``, with learning rates ``lr_s``, an element's change gets the variance ``r sum_s lr_s^2``. The
delta method carries it to the scores.

Elements count as independent. Layers and terms count as wholly dependent, which can only widen the
error. It does not say where later training goes: docs/selection.md has how often a settled first
term is not that of the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist, fmean

from torch import Tensor

from beft_ext import scores
from beft_ext.models import Bias
from beft_ext.selection.run import Run

Score = Callable[[Tensor, Tensor], float]
Error = Callable[[Tensor, Tensor, Tensor], float]
# Scores whose error is known: the score and its standard error.
SETTLING: dict[str, tuple[Score, Error]] = {
    "beft": (scores.beft_score, scores.beft_error),
    "magnitude": (scores.magnitude, scores.magnitude_error),
}
FIRST, GROWTH = 4, 1.2  # steps before the first look, and from look to look


class Settling:
    """Asked after each step of a run: is the first term by ``method`` settled?

    It looks again whenever the run is a fifth longer than at the last look.

    Args:
        method: one of ``SETTLING``.
        risk: accepted probability, at one look, that chance alone put the first term before any
            of the others (one-sided normal, Bonferroni over the others).
        names: the candidate of each bias, by default its term.
    """

    def __init__(self, method: str, risk: float, names: Mapping[Bias, str] | None = None) -> None:
        self.score, self.error = SETTLING[method]
        self.risk, self.look, self.names = risk, FIRST, names or {}

    def __call__(self, run: Run) -> bool:
        if run.done < self.look:
            return False
        self.look = next_look(run.done)
        return is_settled(*self.measured(run), self.risk)

    def measured(self, run: Run) -> tuple[dict[str, float], dict[str, float]]:
        """Each term's score and its standard error, means over layers; undefined ones left out."""
        values: dict[str, list[float]] = {}
        errors: dict[str, list[float]] = {}
        statistics, current = run.tap.statistics(), run.current()
        for bias, (total, squares) in statistics.items():
            b0, b = run.initial[bias], current[bias]
            variance = chance(total, squares, run.examples, run.done) * run.rate_sq
            name = self.names.get(bias, bias.term)
            values.setdefault(name, []).append(self.score(b0, b))
            errors.setdefault(name, []).append(self.error(b0, b, variance))
        known = [t for t, v in values.items() if not any(math.isnan(x) for x in v)]
        return {t: fmean(values[t]) for t in known}, {t: fmean(errors[t]) for t in known}


def next_look(steps: int) -> int:
    """The number of steps at which the look after ``steps`` is taken."""
    return math.ceil(steps * GROWTH)


def is_settled(means: Mapping[str, float], errors: Mapping[str, float], risk: float) -> bool:
    """Whether the first term's score stands far enough above every other's."""
    if len(means) < 2:
        return False
    quantile = NormalDist().inv_cdf(1 - risk / (len(means) - 1))
    first = max(means, key=lambda term: means[term])
    return all(
        means[first] - means[other] > quantile * (errors[first] + errors[other])
        for other in means
        if other != first
    )


def chance(grad_sum: Tensor, grad_sum_sq: Tensor, examples: int, steps: int) -> Tensor:
    """Share of noise in the variance of an AdamW step of size 1 (``r``), ``(H,)``, float64.

    grad_sum, grad_sum_sq: ``(H,)``, sums of ``g_i`` and ``g_i^2`` over the examples of all steps.
    """
    mean = grad_sum.double() / examples
    noise = (grad_sum_sq.double() / examples - mean.square()).clamp(min=0) * steps / examples
    return (noise / (mean.square() + noise)).nan_to_num(0.0)  # 0 / 0: it never moved
