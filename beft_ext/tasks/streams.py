"""More examples than are held in memory: made as their rows are read, and batched from a buffer.

A pass over a stream draws each next row by chance from a buffer of ``BUFFER`` rows, which the file
fills up again. What is drawn follows from the seed, the number of the pass and the rows' order
alone: not from how much is read at a time, the number of ranks, or the tokenizer. So a pass that
was broken off can be entered again. Rows become tokens as their batch is due.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import TypeVar

from torch import Tensor

from beft_ext.errors import BeftWarning
from beft_ext.tasks.batches import GROUP, NONE_LEFT, SORTED_BATCHES, Batches, Encoded, split
from beft_ext.tasks.cells import DataError
from beft_ext.tasks.examples import Example, subset
from beft_ext.tasks.rows import HELD, Rows
from beft_ext.tasks.task import Task

T = TypeVar("T")

Numbered = tuple[int, Example]

BUFFER = 2**14  # rows of which each next one is drawn


class Examples:
    """Examples of a task, made anew from the rows by every pass."""

    def __init__(self, task: Task, rows: Rows) -> None:
        self.task, self.rows = task, rows

    def __iter__(self) -> Iterator[Example]:
        return self.task.made(self.rows.numbered(self.task.columns), self.rows.where)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def labels(self) -> array[float]:
        """The label of every example, from a pass over the label's column alone."""
        task = self.task.wordless
        made = task.made(self.rows.numbered(task.columns), self.rows.where)
        return array("d", (example.label for example in made))

    def subset(self, size: int | None, seed: int) -> Examples | list[Example]:
        """The examples that ``subset`` of all in a list draws: in its order where they are few."""
        if size is None:
            return self
        chosen = subset(range(len(self)), size, seed)
        part = Examples(self.task, self.rows.part(chosen))
        if size > HELD:
            return part
        found = dict(zip(sorted(chosen), part, strict=True))
        return [found[place] for place in chosen]


class Stream(Batches):
    """Batches of examples that are not held; every pass reads them anew, in an order of its own.

    Rows of like length are those with a like number of letters, so that a rank makes tokens of its
    own rows alone.

    Args:
        every: the examples.
        encode: makes rows of examples; None for one that is left out.
        parts: of an example's row.
        notes: what ``encode`` counts; they are of one pass.
    """

    def __init__(
        self,
        every: Examples,
        encode: Callable[[Sequence[Example]], list[Encoded | None]],
        parts: Callable[[Example], int],
        collate: Callable[[Sequence[Encoded]], dict[str, Tensor]],
        size: int,
        seed: int,
        by_length: bool,
        notes: dict[str, int],
    ) -> None:
        super().__init__((), collate, size, seed, by_length)
        self.every, self._encode, self._parts, self._notes = every, encode, parts, notes
        self._chance = seed * 1_000_003

    @property
    def examples(self) -> None:
        """Not known before the end."""

    @cached_property
    def counted(self) -> list[int]:
        """Of the rows that may be in one batch, from a pass over all."""
        if isinstance(self.every.task.options, str):  # each row has options of its own
            return list(Counter(map(self._parts, self.every)).values())
        return [len(self.every)]

    def _counts(self) -> Iterable[int]:
        return self.counted

    def few(self, count: int) -> list[Encoded]:
        rows = (row for example in self.every for row in self._encode([example]) if row is not None)
        if (first := next(rows, None)) is None:
            raise DataError(NONE_LEFT)
        return [first, *islice((row for row in rows if row.parts == first.parts), count - 1)]

    def digest(self) -> str:
        """Of the file, and of the first rows as tokens."""
        first = repr((self.every.rows.digest(), self.few(self.size)))
        return hashlib.sha256(first.encode()).hexdigest()

    def at_hand(self) -> Batches:
        """Batches of ``BUFFER`` rows or fewer, drawn from all."""
        drawn = self.every.subset(min(BUFFER, len(self.every)), self.seed or 0)
        rows = [row for row in self._encode(list(drawn)) if row is not None]
        return Batches(rows, self.collate, self.size, self.seed, self._by_length)

    @property
    def grouped(self) -> str | None:
        return GROUP if self.every.task.group else None

    def own(self, epoch: int) -> list[int]:
        windows = self._windows(epoch)
        return [i for window in windows for batch in window for i, _ in self._mine(batch)]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, self._passes = self._passes, self._passes + 1
        self._notes.clear()
        done, of = 0, len(self) if "counted" in vars(self) else None
        for window in self._windows(epoch):
            for rows in self._tokens([self._mine(batch) for batch in window]):
                done += 1
                yield self.collate(rows) if rows else {}
                self.taken(done, of)

    def _tokens(self, batches: Sequence[Sequence[Numbered]]) -> Iterator[list[Encoded]]:
        rows = iter(self._encode([example for batch in batches for _, example in batch]))
        for batch in batches:
            left = [row for row in islice(rows, len(batch)) if row is not None]
            if batch and not left and self._share == (0, 1):  # a rank of several may have none
                raise DataError(NONE_LEFT)
            yield left

    def _windows(self, epoch: int) -> Iterator[list[list[Numbered]]]:
        """Some batches at a time, of rows that are sorted by length among each other."""
        chance = random.Random(self._chance + epoch)
        every = enumerate(self.every)
        first = list(islice(every, BUFFER))
        if epoch == 0:
            _warn_of_order([example for _, example in first])
        waiting: dict[int, list[Numbered]] = {}
        for numbered in mixed(chain(first, every), BUFFER, chance):
            group = waiting.setdefault(self._parts(numbered[1]), [])
            group.append(numbered)
            if len(group) == SORTED_BATCHES * self.size:
                yield self._window(group, chance)
                group.clear()
        for group in filter(None, waiting.values()):
            yield self._window(group, chance)

    def _window(self, group: list[Numbered], chance: random.Random) -> list[list[Numbered]]:
        if not self._by_length:
            return split(group, self.size)
        batches = split(sorted(group, key=lambda numbered: -_letters(numbered[1])), self.size)
        chance.shuffle(batches)
        return batches


def mixed(items: Iterable[T], room: int, chance: random.Random) -> Iterator[T]:
    """The items in an order by chance, each drawn from ``room`` of them."""
    held: list[T] = []
    for item in items:
        if len(held) < room:
            held.append(item)
            continue
        place = int(chance.random() * room)
        held[place], item = item, held[place]
        yield item
    chance.shuffle(held)
    yield from held


def _letters(example: Example) -> int:
    return len(example.text) + len(example.pair or "") + len(example.prompt)


def _warn_of_order(first: Sequence[Example]) -> None:
    if len(first) == BUFFER and len({example.right for example in first}) == 1 and first[0].right:
        warnings.warn(
            f"the first {BUFFER:,} training rows all have the same label, and each row is drawn "
            "from as many: if the file's rows lie class by class, put them in random order",
            BeftWarning,
            stacklevel=2,
        )
