"""Examples: rows of a task in words, whatever the kind of task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

from beft_ext.tasks.cells import DataError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """One row, in words. label: class, choice or number; right: every choice that is right. A
    row without a label has these and the answers as they are here. group: what it has in common
    with other rows; None where the task or the row does not say."""

    text: str
    pair: str | None
    prompt: str
    options: tuple[str, ...]
    label: float = 0.0
    right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    group: str | Decimal | None = None


def subset(examples: Sequence[T], size: int | None, seed: int) -> list[T]:
    """``size`` of the examples or rows, drawn without replacement, in a seeded order."""
    if size is None:
        return list(examples)
    if not 0 < size <= len(examples):
        raise DataError(f"--train-size {size} must be 1 to {len(examples)}, the number of rows")
    return random.Random(seed).sample(list(examples), size)
