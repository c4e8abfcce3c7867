"""Which rows of a module's output belong to which example. Found by trying, not by shape.

The model runs once as it is and once with one example replaced by another of the batch: the rows
of an output that change are that example's. A row is kept as one number, its product with a
fixed random vector, so that two runs of a large model cost little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from beft_ext.errors import BeftError

EXAMPLES = 4  # that are replaced, one after another, until every layout is known
NOISE = 1e-3  # of the largest number: what another example may change by rounding (experts)
# Inputs that say where the texts of a packed batch are; their tokens move, these do not.
PLACES = ("position_ids", "attention_mask", "cu_seq", "max_length", "seq_idx")

Key = TypeVar("Key", bound=Hashable)


class TapError(BeftError, RuntimeError):
    """A model that cannot be tapped as asked."""


@dataclass(frozen=True)
class Layout:
    """The examples lie along ``axis`` of an output ``(..., H)``, which holds B or a multiple.

    outer: each example has a block of the axis; otherwise every B-th entry.
    """

    axis: int
    outer: bool = True

    def by_example(self, output: Tensor, batch: int) -> Tensor:
        """``(B, rows, H)``: a view where strides allow it. Raises TapError where B does not fit."""
        if output.ndim <= self.axis + 1 or output.shape[self.axis] % batch:
            raise TapError(
                f"an output of shape {tuple(output.shape)} does not hold {batch} examples along "
                f"axis {self.axis}, where the tap found them before"
            )
        parts = output.unflatten(self.axis, (batch, -1) if self.outer else (-1, batch))
        return parts.movedim(self.axis + (not self.outer), 0).flatten(1, -2)

    def holds(self, changed: Tensor, batch: int, example: int) -> bool:
        """Whether all rows of ``changed`` that are true are those of the example."""
        rows = self.by_example(changed[..., None], batch).flatten(1).any(1)
        return int(rows.sum()) == 1 and bool(rows[example])


@dataclass(frozen=True)
class Packed:
    """All examples of a packed batch lie one after another along the tokens."""

    offsets: tuple[int, ...]

    def holds(self, changed: Tensor, batch: int, example: int) -> bool:
        """As of ``Layout``."""
        rows = changed.flatten().nonzero().flatten()
        start, stop = self.offsets[example : example + 2]
        return bool(((rows >= start) & (rows < stop)).all())


def fingerprint(output: Tensor) -> Tensor:
    """A number for each row of ``(..., H)``."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(output.shape[-1], generator=generator).to(output.device)
    dtype = torch.promote_types(output.dtype, torch.float32)
    return output.detach().to(dtype) @ vector.to(dtype)


def locate(
    rows: Callable[[int | None], Mapping[Key, Tensor]],
    batch: int,
    offsets: Tensor | None = None,
) -> dict[Key, Layout | Packed | None]:
    """The layout of each output; None where it cannot be told.

    Args:
        rows: the fingerprints of every output with this example replaced (None: with none).
        batch: number of examples, B.
        offsets: of a packed batch, ``(B + 1,)``.
    """
    before = rows(None)
    possible = {key: _candidates(found.shape, batch, offsets) for key, found in before.items()}
    unmoved = set(before)
    order = range(batch - 1, -1, -1) if offsets is None else _longest_first(offsets)
    for example in list(order)[:EXAMPLES]:
        after = rows(example)
        for key, was in before.items():
            now = after.get(key)
            if now is None or now.shape != was.shape:
                possible[key] = []
                continue
            for changed in _changed(was, now):
                if bool(changed.any()):
                    unmoved.discard(key)
                    fitting = [c for c in possible[key] if c.holds(changed, batch, example)]
                    if fitting:
                        break
            else:
                fitting = [] if key not in unmoved else possible[key]
            possible[key] = fitting
        if not unmoved and all(len(c) < 2 for c in possible.values()):
            break
    return {k: c[0] if len(c) == 1 and k not in unmoved else None for k, c in possible.items()}


def _candidates(
    shape: torch.Size, batch: int, offsets: Tensor | None
) -> list[Layout] | list[Packed]:
    if offsets is not None:
        ends = tuple(offsets.tolist())
        return [Packed(ends)] if shape.numel() == ends[-1] else []
    found = []
    for axis, size in enumerate(shape):
        if size and size % batch == 0:
            found.append(Layout(axis))
            if size > batch:
                found.append(Layout(axis, outer=False))
    return found


def _changed(was: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that differ at all, and by more than rounding."""
    difference = (was - now).abs().nan_to_num(0.0)
    scale = was.abs().nan_to_num(0.0, 0.0, 0.0).max()
    return difference > 0, difference > NOISE * scale


def _longest_first(offsets: Tensor) -> list[int]:
    return [int(i) for i in offsets.diff().argsort(descending=True)]


def replaced(
    inputs: Mapping[Any, Any], example: int, batch: int, offsets: Tensor | None = None
) -> dict[Any, Any]:
    """``inputs`` with one example replaced: by the next of the batch or, of a packed batch, by its
    own tokens in another order. What has no row for each example stays.

    Raises TapError where the batch cannot be divided among so many examples.
    """
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.ndim}
    if not tensors:
        raise TapError(
            "where the examples lie cannot be told: the model was called without tensors"
        )
    if offsets is not None:
        start, stop = (int(o) for o in offsets[example : example + 2])
        moved = {k: _rolled(v, start, stop, int(offsets[-1])) for k, v in tensors.items()
                 if not str(k).startswith(PLACES)}  # fmt: skip
        return dict(inputs) | moved
    size = len(next(iter(tensors.values())))
    if size % batch:
        raise TapError(f"{batch} examples were announced, but the model got {size} rows")
    rows = {k: v for k, v in tensors.items() if len(v) in (size, batch)}
    other = (example + 1) % batch
    return dict(inputs) | {k: _swapped(v, example, other, len(v) // batch) for k, v in rows.items()}


def _swapped(tensor: Tensor, example: int, other: int, parts: int) -> Tensor:
    copied = tensor.detach().clone()
    rows = copied.unflatten(0, (-1, parts))
    rows[example] = tensor.detach().unflatten(0, (-1, parts))[other]
    return copied


def _rolled(tensor: Tensor, start: int, stop: int, tokens: int) -> Tensor:
    axes = next((n for n in (1, 2) if tensor.shape[:n].numel() == tokens), None)
    if axes is None:
        return tensor
    rows = tensor.detach().clone()
    flat = rows.flatten(0, axes - 1)
    flat[start:stop] = flat[start:stop].roll(1, 0)
    return rows
