"""Which rows of a module's output belong to which example. Found by trying, not by shape.

The model runs once as it is and once with one example replaced by another of the batch: the rows
of an output that change are that example's. A row is kept as one number, its product with a
fixed random vector, so that two runs of a large model cost little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from beft_ext.errors import BeftError

EXAMPLES_TRIED = 4  # that are replaced, one after another, until every layout is known
ROUNDING_NOISE = 1e-3  # of the largest number: another example's effect by rounding (experts)
# Inputs that say where tokens are, as masks do; an example's tokens move, these do not.
PLACE_INPUTS = ("position_ids", "cu_seq", "max_length", "seq_idx")

Key = TypeVar("Key")


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

    def rows(self, output: Tensor, batch: int, example: int) -> Tensor:
        """Those of one example, ``(rows, H)``."""
        return self.by_example(output, batch)[example]


@dataclass(frozen=True)
class Packed:
    """The examples of a packed batch lie one after another along the tokens."""

    offsets: tuple[int, ...]

    def rows(self, output: Tensor, batch: int, example: int) -> Tensor:
        """As of ``Layout``."""
        start, stop = self.offsets[example : example + 2]
        return output.reshape(-1, output.shape[-1])[start:stop]


Place = Layout | Packed
# The fingerprints of every output with this example replaced (None: with none).
Changes = Callable[[int | None], Mapping[Key, Tensor]]
# What a change of each output does to the rows of this example in outputs that are known.
Influence = Callable[[int, Mapping[Key, Place | None]], Mapping[Key, Tensor]]


def fingerprint(output: Tensor) -> Tensor:
    """A number for each row of ``(..., H)``."""
    vector = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(0))
    dtype = torch.promote_types(output.dtype, torch.float32)
    return output.to(dtype) @ vector.to(output.device, dtype)


def locate(
    changes: Changes[Key], influence: Influence[Key], batch: int, offsets: Tensor | None = None
) -> dict[Key, Place | None]:
    """Where the examples lie in each output; None where it cannot be told.

    Outputs that no input changes (learnt tokens, one copy for each example) are told by their
    influence on the others.

    Args:
        changes, influence: run the model.
        batch: number of examples, B.
        offsets: of a packed batch, ``(B + 1,)``.
    """
    before = changes(None)
    places = _Places({k: v.shape for k, v in before.items()}, batch, offsets)
    order = range(batch - 1, -1, -1) if offsets is None else offsets.diff().argsort().tolist()[::-1]
    for example in order[:EXAMPLES_TRIED]:
        after = changes(example)
        for key, was in before.items():
            places.narrow(key, was, after.get(key), example)
        if places.settled():
            break
    if places.unmoved:
        for example in order[:EXAMPLES_TRIED]:
            known = places.found()
            for key, effect in influence(example, known).items():
                places.narrow(key, torch.zeros_like(effect), effect, example)
            if places.settled():
                break
    return places.found()


class _Places(Generic[Key]):
    """What is still possible for each output."""

    def __init__(
        self, shapes: Mapping[Key, torch.Size], batch: int, offsets: Tensor | None
    ) -> None:
        self.batch = batch
        ends = None if offsets is None else tuple(offsets.tolist())
        self.possible = {key: _candidates(shape, batch, ends) for key, shape in shapes.items()}
        self.unmoved = set(shapes)  # outputs that nothing has changed so far

    def narrow(self, key: Key, was: Tensor, now: Tensor | None, example: int) -> None:
        """Keep what puts all rows that differ into the example."""
        if now is None or now.shape != was.shape:
            self.unmoved.discard(key)
            self.possible[key] = []
            return
        difference = (now - was).abs().nan_to_num(0.0)
        scale = torch.maximum(was.abs(), now.abs()).nan_to_num(0.0, 0.0, 0.0).max()
        every, clear = difference > 0, difference > ROUNDING_NOISE * scale
        if not bool(every.any()):
            return
        self.unmoved.discard(key)
        fitting = [c for c in self.possible[key] if self._holds(c, every, example)]
        if not fitting and bool(clear.any()):
            fitting = [c for c in self.possible[key] if self._holds(c, clear, example)]
        self.possible[key] = fitting

    def _holds(self, place: Place, changed: Tensor, example: int) -> bool:
        """Whether no row outside of the example is among ``changed``."""
        inside = place.rows(changed[..., None], self.batch, example).sum()
        return bool(inside == changed.sum())

    def settled(self) -> bool:
        return not self.unmoved and all(len(c) < 2 for c in self.possible.values())

    def found(self) -> dict[Key, Place | None]:
        return {
            k: c[0] if len(c) == 1 and k not in self.unmoved else None
            for k, c in self.possible.items()
        }


def _candidates(shape: torch.Size, batch: int, ends: tuple[int, ...] | None) -> list[Place]:
    if ends is not None:
        return [Packed(ends)] if shape.numel() == ends[-1] else []
    found: list[Place] = []
    for axis, size in enumerate(shape):
        if size and size % batch == 0:
            found.append(Layout(axis))
            if size > batch:
                found.append(Layout(axis, outer=False))
    return found


def replaced(
    inputs: Mapping[Key, object], example: int, batch: int, offsets: Tensor | None = None
) -> dict[Key, object]:
    """``inputs`` with one example replaced.

    By the next of the batch, its tokens in reverse; of a packed batch, by its own tokens in
    another order. What has no row for each example stays.

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
                 if not _is_place(k)}  # fmt: skip
        return dict(inputs) | moved
    size = len(next(iter(tensors.values())))
    if size % batch:
        raise TapError(f"{batch} examples were announced, but the model got {size} rows")
    rows = {k: v for k, v in tensors.items() if len(v) in (size, batch)}
    other = (example + 1) % batch
    return dict(inputs) | {
        k: _swapped(v, example, other, len(v) // batch, not _is_place(k)) for k, v in rows.items()
    }


def _is_place(key: object) -> bool:
    return str(key).startswith(PLACE_INPUTS) or "mask" in str(key)


def _swapped(tensor: Tensor, example: int, other: int, parts: int, turn: bool) -> Tensor:
    """The other's rows in place of the example's; tokens also in reverse, as texts may be equal."""
    copied = tensor.detach().clone()
    rows = copied.unflatten(0, (-1, parts))
    given = tensor.detach().unflatten(0, (-1, parts))[other]
    tokens = turn and tensor.ndim > 1 and not tensor.is_floating_point()
    if tokens:
        given = given.flip(-1)
        if torch.equal(given, rows[example]):  # equal texts of one repeated token
            given = torch.where(given > 0, given - 1, given)
    rows[example] = given
    return copied


def _rolled(tensor: Tensor, start: int, stop: int, tokens: int) -> Tensor:
    axes = next((n for n in (1, 2) if tensor.shape[:n].numel() == tokens), None)
    if axes is None:
        return tensor
    rows = tensor.detach().clone()
    flat = rows.flatten(0, axes - 1)
    flat[start:stop] = flat[start:stop].roll(1, 0)
    return rows
