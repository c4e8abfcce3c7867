"""Batches of tokenized examples, each as long as its own longest row, in seeded order."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

GROUP = "group"
SORTED_BATCHES = 16  # within which rows are sorted by length: enough order is left to chance
NONE_LEFT = "no example is left: every answer is longer than the model's input"


@dataclass(frozen=True, slots=True)
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
        self.size, self.seed, self._by_length, self._passes = size, seed, by_length, 0
        self._share = (0, 1)  # this one's number and how many there are
        # Called when a batch of a pass was dealt with, with how many are done, of how many.
        self.taken: Callable[[int, int | None], None] = _untold

    def __len__(self) -> int:
        return sum(-(-n // self.size) for n in self._counts())

    @property
    def examples(self) -> int | None:
        """Number of rows that this one reads in a pass; None where it is not known yet."""
        batches = (b for n in self._counts() for b in split(range(n), self.size))
        return sum(len(self._mine(batch)) for batch in batches)

    def _counts(self) -> Iterable[int]:
        """Of the rows that may be in one batch."""
        return Counter(row.parts for row in self.rows).values()

    def few(self, count: int) -> list[Encoded]:
        """So many rows, or all there are, that may be in one batch."""
        alike = (row for row in self.rows if row.parts == self.rows[0].parts)
        return list(islice(alike, count))

    def digest(self) -> str:
        """Of the rows."""
        counted = hashlib.sha256()
        for row in self.rows:
            counted.update(repr(row).encode())
        return counted.hexdigest()

    def at_hand(self) -> Batches:
        """Batches whose ``rows`` can be parted and asked for by number."""
        return self

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
        ``(B,)``, the same wherever the row is read; no model takes it."""
        if not self.grouped:
            return self
        found = copy.copy(self)
        found.collate = lambda rows: (
            self.collate(rows) | {GROUP: torch.tensor([_number_of(row) for row in rows])}
        )
        return found

    def shared(self, rank: int, ranks: int) -> Batches:
        """The part of every batch that is one rank's: together they are the batch, in its order. A
        batch of which a rank has no row is empty."""
        found = copy.copy(self)
        found._share, found._passes = (rank, ranks), 0
        return found

    def own(self, epoch: int) -> list[int]:
        """Numbers of the rows that this one reads in a pass."""
        self.set_epoch(epoch)
        found = [i for indices in self.plan() for i in self._mine(indices)]
        self.set_epoch(epoch)
        return found

    def _mine(self, batch: Sequence[T]) -> list[T]:
        """Of one batch; the earlier ranks have one more where it cannot be divided evenly."""
        rank, ranks = self._share
        first, last = (-(-len(batch) * r // ranks) for r in (rank, rank + 1))
        return list(batch[first:last])

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number ``epoch``, as with torch's DistributedSampler."""
        self._passes = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        plan = self.plan()
        for done, indices in enumerate(plan, 1):
            mine = self._mine(indices)
            yield self.collate([self.rows[i] for i in mine]) if mine else {}
            self.taken(done, len(plan))

    def plan(self) -> list[list[int]]:
        """Numbers of the rows of each batch of the next pass."""
        generator = torch.Generator()
        order = list(range(len(self.rows)))
        if self.seed is not None:
            generator.manual_seed(self.seed * 1_000_003 + self._passes)
            order = torch.randperm(len(order), generator=generator).tolist()
            self._passes += 1
        window = len(order) if self.seed is None else SORTED_BATCHES * self.size
        groups: dict[int, list[int]] = {}
        for i in order:
            groups.setdefault(self.rows[i].parts, []).append(i)
        batches: list[list[int]] = []
        for group in groups.values():
            if self._by_length or self.seed is None:
                group = [i for part in split(group, window) for i in self._longest_first(part)]
            batches += split(group, self.size)
        if self.seed is not None and (self._by_length or len(groups) > 1):
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[i] for i in shuffled]
        return batches

    def _longest_first(self, indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda i: -self.rows[i].length)


def _number_of(row: Encoded) -> int:
    """Of its group; of itself where it has none."""
    group = row.group.normalize() if isinstance(row.group, Decimal) else row.group
    own = repr(row.fields if group is None else (group,))
    return int.from_bytes(hashlib.sha256(own.encode()).digest()[:7])


def padded(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """``(N, longest)`` of rows filled up with ``value``."""
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return torch.tensor([[*f, *r] if left else [*r, *f] for r, f in pairs])


def split(items: Sequence[T], size: int) -> list[list[T]]:
    """The items, so many at a time."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def _untold(done: int, of: int | None) -> None:
    """Nobody is told how far a pass is."""
