"""Sets of terms and bands of layers: which of them explain most for their number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from beft_ext.gains import Each, GainError, Gram, Regression, gain
from beft_ext.selection.evidence import Evidence

ROUNDS = 3  # a set has as many parts at most
CHOOSING = 250  # examples by which sets are chosen, at most


@dataclass(frozen=True)
class Part:
    """A term in a band of layers, or in all: its ``K`` are in units of the term's ridge."""

    name: str
    elements: int
    matrices: tuple[Tensor, ...]
    ridge: float
    pieces: frozenset[tuple[str, tuple[int, int]]]


def frontier(
    evidence: Evidence, ridges: Mapping[str, float], seed: int, each: Each = map
) -> list[tuple[str, int, float]]:
    """Sets that explain more than every set of fewer parameters: name, parameters, gain.

    Chosen greedily on one half of the examples; the gain is told from the other half. Each term
    enters with its own ridge, or else the widest would rule.

    ridges: the best of each term alone, in units of ``K``. each: as ``map``.
    """
    regression = evidence.regression
    order = torch.randperm(
        len(regression.blocks), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    half = min(len(order) // 2, CHOOSING)
    try:
        choosing, telling = (
            _Half(regression, torch.cat([regression.blocks[i] for i in part]))
            for part in (order[:half], order[half:])
        )
    except GainError:  # too few examples for halves
        return []
    chosen: dict[tuple[str, ...], tuple[int, float]] = {}
    parts = _parts(evidence, ridges)
    best: list[Part] = []
    for _ in range(ROUNDS):
        taken = frozenset().union(*(p.pieces for p in best))
        tried = [[*best, p] for p in parts if not p.pieces & taken]
        for group, value in zip(tried, each(choosing.gain, tried), strict=True):
            chosen[_names(group)] = (_size(group), value)
        if not tried:
            break
        longer = max(tried, key=lambda g: chosen[_names(g)][1])
        if best and chosen[_names(longer)][1] <= chosen[_names(best)][1]:
            break
        best = longer
    named = {p.name: p for p in parts}
    kept, most = [], 0.0
    for names, (size, value) in sorted(chosen.items(), key=lambda item: (item[1][0], -item[1][1])):
        if value > most:
            most = value
            kept.append((names, size))
    told = each(lambda entry: telling.gain([named[n] for n in entry[0]]), kept)
    return [("+".join(names), size, value) for (names, size), value in zip(kept, told, strict=True)]


class _Half:
    """Some of the examples."""

    def __init__(self, regression: Regression, rows: Tensor) -> None:
        self.rows, self.regression = rows, regression.part(rows)
        self.blocks: dict[str, Tensor] = {}  # of the parts that were asked for

    def gain(self, group: list[Part]) -> float:
        matrix = reduce(torch.add, map(self._block, group))
        return gain(Gram.of(matrix), self.regression).value

    def _block(self, part: Part) -> Tensor:
        if part.name not in self.blocks:
            own = (k[self.rows][:, self.rows] for k in part.matrices)
            self.blocks[part.name] = reduce(torch.add, own) / part.ridge
        return self.blocks[part.name]


def _parts(evidence: Evidence, ridges: Mapping[str, float]) -> list[Part]:
    parts = []
    for term, by_band in evidence.grams.items():
        sizes = evidence.elements[term]
        for band, matrix in by_band.items():
            name = f"{term.partition('@')[0]}@{band[0]}-{band[1]}" if len(by_band) > 1 else term
            pieces = frozenset([(term, band)])
            parts.append(Part(name, sizes[band], (matrix,), ridges[term], pieces))
        if len(by_band) > 1:
            pieces, every = frozenset((term, band) for band in by_band), tuple(by_band.values())
            parts.append(Part(term, sum(sizes.values()), every, ridges[term], pieces))
    return parts


def _size(group: list[Part]) -> int:
    return sum(p.elements for p in group)


def _names(group: list[Part]) -> tuple[str, ...]:
    return tuple(p.name for p in group)
