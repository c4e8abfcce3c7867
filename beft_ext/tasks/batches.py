"""Batches of tokenized examples, each as long as its own longest row, in seeded order."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

GROUP = "group"
SORTED_BATCHES = 16  # within which rows are sorted by length: enough order is left to chance


@dataclass(frozen=True)
class Encoded:
    """One example as tokens. length: of its longest row; parts: rows that it has in a batch, the
    same for all examples of a batch; group: as ``Example.group``."""

    fields: Any
    label: float
    length: int
    parts: int = 1
    group: str | Decimal | None = None


class Batches:
    """A loader of keyword arguments of a model; every pass draws a new order.

    The orders follow from ``seed`` and the number of the pass alone (``set_epoch`` sets it);
    ``seed=None`` goes from long to short, the same each time. ``by_length`` makes batches of
    rows of like length: fewer padding tokens, batches a little less random.

    share: this one's number and how many there are, where several processes read parts of the same
    batches. A batch of which this one has no row is empty.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        collate: Callable[[Sequence[Encoded]], dict[str, Tensor]],
        size: int,
        seed: int | None = None,
        by_length: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.rows, self.collate = rows, collate
        self.size, self._seed, self._by_length, self._passes = size, seed, by_length, 0
        self._share = share

    def __len__(self) -> int:
        return sum(-(-n // self.size) for n in self._counts())

    @property
    def examples(self) -> int:
        """Number of rows that this one reads in a pass."""
        batches = (b for n in self._counts() for b in _split(list(range(n)), self.size))
        return sum(len(self._mine(batch)) for batch in batches)

    def _counts(self) -> Iterable[int]:
        """Of the rows that may be in one batch."""
        return Counter(row.parts for row in self.rows).values()

    def part(self, indices: Sequence[int], seed: int | None = None) -> Batches:
        """Batches of some of the rows, which ``plan`` counts from 0 in the order of ``indices``."""
        rows = [self.rows[i] for i in indices]
        return Batches(rows, self.collate, self.size, seed, self._by_length)

    @property
    def grouped(self) -> str | None:
        """``GROUP`` where rows say what they have in common."""
        return GROUP if any(row.group is not None for row in self.rows) else None

    def with_groups(self) -> Batches:
        """The same batches, with a number of what each row belongs to at the key ``GROUP``,
        ``(B,)``; no model takes it."""
        if not self.grouped:
            return self
        names: dict[object, int] = {}
        numbers = {
            id(row): names.setdefault((i,) if row.group is None else row.group, len(names))
            for i, row in enumerate(self.rows)
        }
        found = copy.copy(self)
        found.collate = lambda rows: (
            self.collate(rows) | {GROUP: torch.tensor([numbers[id(row)] for row in rows])}
        )
        return found

    def shared(self, rank: int, ranks: int) -> Batches:
        """The part of every batch that is one rank's: together they are the batch, in its order."""
        share = (rank, ranks)
        return Batches(self.rows, self.collate, self.size, self._seed, self._by_length, share)

    def own(self, epoch: int) -> list[int]:
        """Numbers of the rows that this one reads in a pass."""
        self.set_epoch(epoch)
        found = [i for indices in self.plan() for i in self._mine(indices)]
        self.set_epoch(epoch)
        return found

    def _mine(self, indices: list[int]) -> list[int]:
        """Of one batch; the earlier ranks have one more where it cannot be divided evenly."""
        rank, ranks = self._share
        first, last = (-(-len(indices) * r // ranks) for r in (rank, rank + 1))
        return indices[first:last]

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number ``epoch``, as with torch's DistributedSampler."""
        self._passes = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        plan = self.plan()
        for done, indices in enumerate(plan, 1):
            mine = self._mine(indices)
            yield self.collate([self.rows[i] for i in mine]) if mine else {}
            self.taken(done, len(plan))

    def taken(self, done: int, of: int) -> None:
        """Called when a batch of a pass was dealt with; who shows progress does it here."""

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
