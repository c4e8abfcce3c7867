"""The gain: the share of unseen examples' loss that a term alone explains, to first order.

Each example is a row of a linear regression: its target ``t_i`` says how much loss there is, its
row ``g_i`` how the term's biases change it, and ``z_i`` how a mere class prior does. All that a
gain needs of the rows is their Gram matrix ``K``. A ridge regression that leaves each example out
in turn says what was learnt from the others; closed forms stand for the refits.

Pure functions in float64. Definitions and letters: docs/definitions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from beft_ext.errors import BeftError

# Applies a function to each item, as ``map`` does; several processes may share the work.
Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

# Ridges, in units of the mean eigenvalue of K.
RIDGES = torch.logspace(-4, 3, 22, dtype=torch.float64)
# Below this share of an example's own weight, nothing is left of it but rounding.
LEVERAGE = 1e-9


class GainError(BeftError, ValueError):
    """Examples from which no gain can be told."""


@dataclass(frozen=True)
class Regression:
    """What is to be explained.

    Attributes:
        targets: ``t``, the examples' losses, weighted.
        prior: ``Z``, how a class prior changes them; no column where there is none.
        groups: examples with the same number are left out together.

    Shape: ``(N,)``, ``(N, C - 1)``, ``(N,)`` int64.

    Raises:
        GainError: fewer than three groups, or a prior that explains everything.
    """

    targets: Tensor
    prior: Tensor
    groups: Tensor

    def __post_init__(self) -> None:
        if len(self.blocks) < 3:
            raise GainError(
                f"a gain needs at least 3 examples that differ, but there are {len(self.blocks)}"
            )
        if float(self.prior_errors.square().sum()) <= 1e-20 * float(self.targets.square().sum()):
            raise GainError(
                "the examples' losses are all alike once their class is known, so there is "
                "nothing to explain: are all labels the same?"
            )

    @cached_property
    def block_of(self) -> Tensor:
        """Which of the ``blocks`` each example is in, ``(N,)``."""
        return self.groups.unique(return_inverse=True)[1]

    @cached_property
    def blocks(self) -> list[Tensor]:
        """Numbers of the examples of each group."""
        order = self.block_of.argsort(stable=True)
        return list(order.split(self.block_of.bincount().tolist()))

    @cached_property
    def places(self) -> list[Tensor]:
        """Numbers of the examples of groups of two and more, ``(groups, size)`` for each size."""
        by_size: dict[int, list[Tensor]] = {}
        for block in self.blocks:
            by_size.setdefault(len(block), []).append(block)
        return [torch.stack(own) for size, own in by_size.items() if size > 1]

    @cached_property
    def basis(self) -> Tensor:
        """Orthonormal columns that span the prior, ``(N, rank)``."""
        left, sizes, _ = torch.linalg.svd(self.prior.double(), full_matrices=False)
        kept = sizes > 1e-10 * sizes.max() if len(sizes) else sizes.bool()
        return left[:, kept]

    @cached_property
    def residuals(self) -> Tensor:
        """``M t``: what the prior leaves, fitted to all examples."""
        t = self.targets.double()
        return t - self.basis @ (self.basis.T @ t)

    @cached_property
    def prior_errors(self) -> Tensor:
        """``e0``: what a prior fitted to the others leaves of each example, ``(N,)``."""
        return _nothing(self).left(self, self.targets.double()[:, None])[1][0, :, 0]

    def part(self, rows: Tensor) -> Regression:
        """Of some of the examples alone."""
        return Regression(self.targets[rows], self.prior[rows], self.groups[rows])


@dataclass(frozen=True)
class Gram:
    """``K = U diag(s) U^T`` of a term's rows: eigenvalues ``(R,)`` and vectors ``(N, R)``."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Gram:
        """Of ``K`` ``(N, N)``."""
        values, vectors = torch.linalg.eigh(matrix.double())
        return cls(values.clamp(min=0), vectors)

    @cached_property
    def ridges(self) -> Tensor:
        """The ridges that are tried; a single one where the term does nothing."""
        mean = float(self.values.sum()) / max(1, len(self.vectors))
        return RIDGES * mean if mean > 0 else torch.ones(1, dtype=torch.float64)

    def left(self, regression: Regression, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What ridge regressions leave of targets ``(N, F)``, several sets at once.

        Returns ``(ridges, N, F)`` twice: ``A_Z t``, fitted to all examples, and the errors of
        the fits without each group.
        """
        kind = targets.dtype
        u, q = self.vectors.to(kind), regression.basis.to(kind)
        # A = I - U diag(shrunk) U^T, and A_Z = A - A Q (Q^T A Q)^-1 Q^T A.
        shrunk = (self.values / (self.values + self.ridges[:, None])).to(kind)
        a_q = q - _weighed(u, shrunk, q)
        a_t = targets - _weighed(u, shrunk, targets)
        half = torch.linalg.solve(q.T @ a_q, a_q.mT).mT  # A Q (Q^T A Q)^-1
        a_t = a_t - half @ (q.T @ a_t)
        own = 1 - shrunk @ u.square().T - (a_q * half).sum(-1)  # diag A_Z
        errors = torch.where(own[..., None] > LEVERAGE, a_t / own[..., None], targets)
        for places in regression.places:
            own_u = u[places]  # (blocks, size, R)
            for ridge, weights in enumerate(shrunk):
                among = torch.eye(places.shape[1], dtype=kind) - own_u * weights @ own_u.mT
                among = among - a_q[ridge, places] @ half[ridge, places].mT
                errors[ridge, places] = _inverse(among) @ a_t[ridge, places]
        return a_t, errors


def _weighed(u: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """``U diag(w) U^T x`` for each of several weights ``(ridges, R)``: ``(ridges, N, F)``.

    One product for all of them: a batch of products would copy ``U`` for each.
    """
    inner = weights.T[:, :, None] * (u.T @ x)[:, None]
    return (u @ inner.flatten(1)).unflatten(1, inner.shape[1:]).movedim(1, 0)


def _inverse(blocks: Tensor) -> Tensor:
    """Of symmetric blocks ``(n, s, s)``; of those of which only rounding is left in some direction,
    the pseudo-inverse."""
    found = torch.linalg.inv_ex(blocks).inverse
    weak = ~(found.abs().amax((1, 2)) < 1 / LEVERAGE)  # NaN where one is singular
    if bool(weak.any()):
        found[weak] = torch.linalg.pinv(blocks[weak], hermitian=True, rtol=LEVERAGE)
    return found


def _nothing(regression: Regression) -> Gram:
    """Of a term that has no effect: what is left is what the prior leaves."""
    basis = regression.basis
    return Gram(basis.new_zeros(0), basis.new_zeros(len(basis), 0))


@dataclass(frozen=True)
class Gain:
    """What a term explains.

    Attributes:
        value: 1 minus the squared errors, as a share of those of the prior alone.
        error: standard error of ``value``.
        ridge: the best ridge, in units of ``K``.
        step: length of the ridge regression's step, over all of the term's elements.
        squares: each group's squared error and that of the prior alone, ``(groups, 2)``.
    """

    value: float
    error: float
    ridge: float
    step: float
    squares: Tensor


def gain(gram: Gram, regression: Regression) -> Gain:
    """The gain at the best ridge.

    Source: leave-one-out in closed form, Allen 1974 (PRESS); the kernel is that of Malladi et
    al. 2023 (arXiv 2210.05643).
    """
    fitted, errors = (
        t[..., 0] for t in gram.left(regression, regression.targets.double()[:, None])
    )
    best = int(errors.square().sum(-1).argmin())
    ridge = float(gram.ridges[best])
    # The step is G^T A_Z t / ridge, of which K tells the length.
    step = float((gram.values.sqrt() * (gram.vectors.T @ fitted[best])).norm()) / ridge
    before = regression.prior_errors
    each = torch.stack([errors[best].square(), before.square()], dim=-1)
    squares = each.new_zeros(len(regression.blocks), 2).index_add_(0, regression.block_of, each)
    own, prior = squares.unbind(-1)
    value = 1 - float(own.sum() / prior.sum())
    spread = (1 - value) * prior - own
    error = _error_of_sum(spread) / float(prior.sum())
    return Gain(value, error, ridge, step, squares)


def lead(first: Gain, rival: Gain) -> tuple[float, float]:
    """By how much ``first`` explains more than ``rival``, and the standard error of that.

    Paired over examples. Source: Nadeau & Bengio 2003, the corrected variance of
    cross-validation; no unbiased one exists.
    """
    difference = rival.squares[:, 0] - first.squares[:, 0]
    total = float(first.squares[:, 1].sum())
    return float(difference.sum()) / total, _error_of_sum(difference) / total


def _error_of_sum(values: Tensor) -> float:
    """Of the sum over N groups that were each left out once: ``N sd sqrt(1/N + 1/(N-1))``."""
    n = len(values)
    return n * float(values.std()) * (1 / n + 1 / (n - 1)) ** 0.5


def beyond_chance(
    grams: Mapping[str, Gram],
    gains: Mapping[str, Gain],
    regression: Regression,
    flips: int,
    seed: int,
    each: Each = map,
) -> dict[str, float]:
    """For each term the probability that noise alone shows such a gain somewhere.

    The signs of what the prior leaves are flipped at random, group by group; a term's p is the
    share of the ``flips`` whose largest gain, over all terms and ridges, reaches the term's own.

    grams: of those terms of ``gains`` that ``each`` asks this process for.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (len(regression.blocks), flips), generator=generator)
    flipped = regression.residuals[:, None].repeat(1, flips)
    for block, sign in zip(regression.blocks, 2.0 * signs - 1, strict=True):
        flipped[block] *= sign
    flipped = flipped.float()
    before = _nothing(regression).left(regression, flipped)[1][0].square().sum(0)

    def largest_of(term: str) -> Tensor:
        left: Tensor = grams[term].left(regression, flipped)[1].square().sum(1).amin(0)
        return 1 - left / before

    largest = torch.stack(list(each(largest_of, gains))).amax(0)
    return {t: (1 + int((largest >= g.value).sum())) / (1 + flips) for t, g in gains.items()}


def together(*keys: Sequence[object]) -> Tensor:
    """Group numbers ``(N,)``: examples that share a key of one kind are one group, and so are all
    that others link.

    keys: of each kind one for every example; None for an example without.
    """
    first: dict[object, int] = {}
    leaders = list(range(len(keys[0])))

    def leader(i: int) -> int:
        while leaders[i] != i:
            leaders[i] = i = leaders[leaders[i]]
        return i

    for kind, column in enumerate(keys):
        for i, key in enumerate(column):
            if key is not None:
                a, b = sorted((leader(first.setdefault((kind, key), i)), leader(i)))
                leaders[b] = a
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(leader(i), len(numbers)) for i in range(len(leaders))])


def learning_curve(
    matrix: Tensor, regression: Regression, parts: Sequence[int], seed: int, each: Each = map
) -> dict[int, float]:
    """The gain had there been only a part of the examples, by their number.

    matrix: ``K`` ``(N, N)``. parts: 4 cuts the examples into quarters at random; their gains
    are averaged, so that every example counts once. A part too small for a gain is left out.
    """
    count = len(regression.blocks)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    def gain_of(part: tuple[int, int]) -> float | None:
        number, k = part
        rows = torch.cat([regression.blocks[i] for i in order[k::number]])
        try:
            own = regression.part(rows)
        except GainError:
            return None
        return gain(Gram.of(matrix[rows][:, rows]), own).value

    tried = [(number, k) for number in parts if number <= count for k in range(number)]
    found = dict(zip(tried, each(gain_of, tried), strict=True))
    curve: dict[int, float] = {}
    for number in parts:
        values = [v for k in range(number) if (v := found.get((number, k))) is not None]
        if len(values) == number:
            curve[count // number] = sum(values) / number
    return curve
