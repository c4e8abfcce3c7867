"""The examples of a batch: how many there are, what tells them apart, what belongs together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, uint8

from beft_ext.gains import GainError
from beft_ext.training.loss import Batch, offsets_of, rows_of


@dataclass(frozen=True)
class Examples:
    """Those that are read at once.

    Attributes:
        inputs: of the model.
        size: how many there are.
        first: number of the first of them, among all examples.
        offsets: where they begin in a packed batch.
    """

    inputs: Batch
    size: int
    first: int
    offsets: Tensor | None

    @cached_property
    def keys(self) -> list[object]:
        """What tells them apart: their tokens, padding left out, or all that they are."""
        inputs, size = self.inputs, self.size
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if isinstance(ids, Tensor) and self.offsets is not None:
            flat, ends = ids.flatten(), self.offsets.tolist()
            return [_bytes(flat[a:b]) for a, b in itertools.pairwise(ends)]
        if isinstance(ids, Tensor) and len(ids) == size:
            if isinstance(mask, Tensor) and mask.shape == ids.shape:
                return [_bytes(row[own.bool()]) for row, own in zip(ids, mask, strict=True)]
            return [_bytes(row) for row in ids]
        tensors = [v for k, v in inputs.items() if k != "labels" and _has_rows(v, size)]
        return [tuple(_bytes(t[i]) for t in tensors) for i in range(size)]

    def require_finite(self, what: str, values: Tensor) -> None:
        """Raise GainError unless all ``values`` ``(size,)`` are numbers."""
        if not bool(values.isfinite().all()):
            at = self.first + int((~values.isfinite()).nonzero()[0])
            raise GainError(f"the {what} of example {at} is not finite: check the data")


def apart(batch: Batch, groups: str | None) -> tuple[Batch, list[object] | None]:
    """What the model is given, and what each example belongs to, where ``groups`` is a key of the
    batch that says it. Raises GainError where the batch lacks it."""
    if groups is None or not batch:
        return batch, None
    if groups not in batch:
        raise GainError(f"the batches have no '{groups}', which says what belongs together")
    values = batch[groups]
    own: list[object] = values.tolist() if isinstance(values, Tensor) else list(values)
    return {k: v for k, v in batch.items() if k != groups}, own


def number_of_examples(batch: Batch) -> int:
    """How many examples a batch has; an empty one is a step without any on this rank."""
    offsets = offsets_of(batch) if batch else None
    if offsets is not None:
        return len(offsets) - 1
    return rows_of(batch) if batch else 0


def _has_rows(value: object, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().flatten().view(uint8).numpy().tobytes()
