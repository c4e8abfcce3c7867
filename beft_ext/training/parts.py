"""A batch read in parts, one after another: the same step in less memory.

The loss of a batch is a sum over examples or labels, divided by a number. The gradients of the
parts' losses, each times its own number, add up to that sum's gradient; what all counted divides
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from beft_ext.errors import BeftError
from beft_ext.training.joined import NOTHING, Share
from beft_ext.training.loss import Batch, offsets_of, rows_between, rows_of

# As torch's allocators say it, the first that of a GPU; and Python's, as another rank tells it.
FULL = ("out of memory", "can't allocate memory", "not enough memory", "MemoryError")
# Of a part, its loss times its divisor over the second argument where that is given.
PartBackward = Callable[[Batch, float | None], Share]


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """The batch in so many parts of consecutive rows, as equal as can be.

    There are no more parts than rows. A packed batch, whose texts share a row, stays whole.
    """
    if count < 2 or offsets_of(batch) is not None:
        return [batch]
    rows = rows_of(batch)
    count = max(1, min(count, rows))
    cuts = [rows * k // count for k in range(count + 1)]
    return [rows_between(batch, a, b) for a, b in pairwise(cuts)]


def in_parts(
    parts: Sequence[Batch],
    backward: PartBackward,
    trained: Sequence[Tensor],
    given: bool,
) -> Share:
    """The gradients of a batch by a backward of each of its parts.

    Args:
        backward: of a part; its share, with 0 as the divisor where nothing in the part counts.
        trained: their gradients are those of this batch alone.
        given: whether the divisor comes with the batch, for all parts together.
    Returns:
        The share of the whole batch.
    """
    if len(parts) == 1:
        return backward(parts[0], None)
    shares: list[Share] = []
    for part in parts:
        share = backward(part, shares[0].divisor if shares else None)
        if share.divisor:
            shares.append(share)
    if not shares:
        return NOTHING
    unit = shares[0].divisor
    constant = any(s.constant for s in shares)
    total = unit if constant or given else sum(s.divisor for s in shares)
    for parameter in trained:
        if parameter.grad is not None and total != unit:
            parameter.grad.mul_(unit / total)
    return Share(sum(s.loss * s.divisor for s in shares) / total, total, constant)


def shortage_of(error: BaseException | None) -> BaseException | None:
    """The allocator's error that ``error`` is or was raised from, or the ``error`` that says what
    another rank's allocator said. None where memory did not run out."""
    found, kinds = None, (RuntimeError, BeftError)
    while error is not None:
        said = isinstance(error, kinds) and any(s in str(error) for s in FULL)
        if said or isinstance(error, MemoryError):
            found = error
        error = error.__cause__
    return found
