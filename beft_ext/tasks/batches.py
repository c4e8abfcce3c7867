"""Batches of tokenized examples, each as long as its own longest row, in seeded order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SORTED_BATCHES = 16  # within which rows are sorted by length: enough order is left to chance


@dataclass(frozen=True)
class Encoded:
    """One example as tokens. length: of its longest row; parts: rows that it has in a batch, the
    same for all examples of a batch."""

    fields: Any
    label: float
    length: int
    parts: int = 1


class Batches:
    """A loader of keyword arguments of a model; every pass draws a new order.

    The orders follow from ``seed`` and the number of the pass alone (``set_epoch`` sets it);
    ``seed=None`` goes from long to short, the same each time. ``by_length`` makes batches of
    rows of like length: fewer padding tokens, batches a little less random.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        collate: Callable[[Sequence[Encoded]], dict[str, Tensor]],
        size: int,
        seed: int | None = None,
        by_length: bool = False,
    ) -> None:
        self.rows, self.collate = rows, collate
        self.size, self._seed, self._by_length, self._passes = size, seed, by_length, 0

    def __len__(self) -> int:
        counts: dict[int, int] = {}
        for row in self.rows:
            counts[row.parts] = counts.get(row.parts, 0) + 1
        return sum(-(-n // self.size) for n in counts.values())

    def part(self, indices: Sequence[int], seed: int | None = None) -> Batches:
        """Batches of some of the rows, which ``plan`` counts from 0 in the order of ``indices``."""
        rows = [self.rows[i] for i in indices]
        return Batches(rows, self.collate, self.size, seed, self._by_length)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number ``epoch``, as with torch's DistributedSampler."""
        self._passes = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for indices in self.plan():
            yield self.collate([self.rows[i] for i in indices])

    def plan(self) -> list[list[int]]:
        """Numbers of the rows of each batch of the next pass."""
        generator = torch.Generator()
        order = list(range(len(self.rows)))
        if self._seed is not None:
            generator.manual_seed(self._seed * 1_000_003 + self._passes)
            order = torch.randperm(len(order), generator=generator).tolist()
            self._passes += 1
        window = len(order) if self._seed is None else SORTED_BATCHES * self.size
        groups: dict[int, list[int]] = {}
        for i in order:
            groups.setdefault(self.rows[i].parts, []).append(i)
        batches: list[list[int]] = []
        for group in groups.values():
            if self._by_length or self._seed is None:
                group = [i for part in _split(group, window) for i in self._longest_first(part)]
            batches += _split(group, self.size)
        if self._seed is not None and (self._by_length or len(groups) > 1):
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[i] for i in shuffled]
        return batches

    def _longest_first(self, indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda i: -self.rows[i].length)


def padded(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """``(N, longest)`` of rows filled up with ``value``."""
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return torch.tensor([[*f, *r] if left else [*r, *f] for r, f in pairs])


def _split(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
