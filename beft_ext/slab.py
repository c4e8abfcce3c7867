"""A slab: the gradients of single examples, kept row by row as backwards bring them.

Rows that would not fit are kept as whole numbers of 16, 8 or 4 bits, each with a scale: products of
rows are nearly the same in a half, a quarter or an eighth of the memory. Where even that is too
much, a sketch is kept of each bias: every element goes, with a random sign, into one of few
columns. Products stay the same on average, and the slab itself never exists.
Source: the count sketch, Charikar, Chen & Farach-Colton 2002.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from beft_ext.models import Bias
from beft_ext.ops import bias_example_grads

LARGEST_BLOCK = 512
TABLES = {16: torch.int16, 8: torch.int8, 4: torch.uint8}  # by bits; a byte holds two of 4


class SiteSlab:
    """Rows of one parameter's gradients, for its biases.

    Args:
        biases: of the parameter.
        like: a tensor ``(P,)`` with the dtype and device of the rows.
        examples: number of rows, N; more are made where they are needed.
        columns: width of a bias's sketch; a bias that is not wider is kept as it is.
        seed: of the sketches.
        bits: of the whole numbers that rows, or their sketches, are kept as; None for their own
            dtype.
    """

    def __init__(
        self,
        biases: Sequence[Bias],
        like: Tensor,
        examples: int,
        columns: int | None,
        seed: int,
        bits: int | None = None,
    ) -> None:
        self.whole: Tensor | None = None
        self.kept: dict[Bias, _Kept] = {}
        if columns is None and bits is None:
            self.whole = like.new_zeros(examples, len(like))
        else:
            self.kept = {b: _Kept(b, like, examples, columns, seed, bits) for b in biases}

    def take(self, row: int, dy: Tensor, offsets: Tensor | None, scale: float) -> Tensor:
        """Keep the gradients of a batch ``(B, T, H)``, or packed; returns their sum ``(P,)``.

        row: where the first example goes.
        """
        batch = len(dy) if offsets is None else len(offsets) - 1
        if self.whole is not None:
            self.whole = _with_room(self.whole, row + batch)
            out = self.whole[row : row + batch]
        else:
            out = dy.new_empty(batch, dy.shape[-1], dtype=next(iter(self.kept.values())).dtype)
        bias_example_grads(dy, out, example_offsets=offsets, scale=scale)
        for kept in self.kept.values():
            kept.put(row, out)
        return out.sum(0)

    def put(self, row: int, grads: Tensor) -> None:
        """Keep gradients ``(B, P)`` that are summed already."""
        if self.whole is not None:
            self.whole = _with_room(self.whole, row + len(grads))
            self.whole[row : row + len(grads)] = grads
        for kept in self.kept.values():
            kept.put(row, grads)

    def rows(self, bias: Bias, count: int) -> Tensor:
        """The first ``count`` gradients of a bias ``(count, H)``, or their sketches."""
        if self.whole is None:
            return self.kept[bias].read(count)
        return _columns(bias, self.whole[:count])


class _Kept:
    """Rows of one bias, as whole numbers or folded or both."""

    def __init__(
        self,
        bias: Bias,
        like: Tensor,
        examples: int,
        columns: int | None,
        seed: int,
        bits: int | None,
    ) -> None:
        self.bias, self.dtype, self.bits = bias, like.dtype, bits
        generator = torch.Generator().manual_seed(seed * 1_000_003 + bias.layer)
        self.dither = torch.Generator(like.device).manual_seed(generator.initial_seed())
        self.turn = _Turn(bias, like, generator) if bits == 4 else None
        folds = columns is not None and columns < bias.width
        self.fold = _Fold(bias, like, columns, generator) if columns and folds else None
        self.width = columns if columns and folds else bias.width
        kind = None if bits is None else TABLES[bits]
        width = -(-self.width // 2) if bits == 4 else self.width
        self.table = like.new_zeros(examples, width, dtype=kind)
        self.scales = None if bits is None else like.new_ones(examples, 1)

    def put(self, row: int, grads: Tensor) -> None:
        """Keep gradients of the whole parameter ``(B, P)``."""
        own, end = _columns(self.bias, grads).to(self.dtype), row + len(grads)
        for change in (self.turn, self.fold):
            own = own if change is None else change(own)
        if self.scales is not None and self.bits is not None:
            # A row of zeros has any scale; what is not finite stays so by its scale.
            scale = own.abs().amax(1, keepdim=True) / (2 ** (self.bits - 1) - 1)
            own = (own / scale.where(scale > 0, 1)).nan_to_num()
            # A gradient tells its example's label. Rounded alike in all examples of a class, its
            # error would too; rounded by chance it tells nothing.
            own = (own + torch.rand(own.shape, generator=self.dither, device=own.device)).floor()
            self.scales = _with_room(self.scales, end)
            self.scales[row:end] = scale
            if self.bits == 4:
                own = _paired(own)
        self.table = _with_room(self.table, end)
        self.table[row:end] = own.to(self.table.dtype)

    def read(self, count: int) -> Tensor:
        """The first ``count`` rows."""
        if self.scales is None:
            return self.table[:count]
        numbers = self.table[:count]
        if self.bits == 4:
            numbers = _apart(numbers)[:, : self.width]
        return numbers.to(self.dtype) * self.scales[:count]


class _Turn:
    """``(H,)`` turned, so that no element stands out: random signs, then blocks of Hadamard's
    matrix. Products of rows stay the same."""

    def __init__(self, bias: Bias, like: Tensor, generator: torch.Generator) -> None:
        sign = torch.randint(2, (bias.width,), generator=generator) * 2 - 1
        self.sign = sign.to(like)
        self.block = _hadamard(math.gcd(bias.width, LARGEST_BLOCK), like.dtype, like.device)

    def __call__(self, rows: Tensor) -> Tensor:
        return ((rows * self.sign).unflatten(1, (-1, len(self.block))) @ self.block).flatten(1)


class _Fold:
    """``(H,)`` folded into ``columns``: elements in a random order, with random signs, cut into
    pieces of that width that are added up."""

    def __init__(self, bias: Bias, like: Tensor, columns: int, generator: torch.Generator) -> None:
        self.columns = columns
        self.beyond = -bias.width % columns  # zeros that fill the last piece
        order = torch.randperm(bias.width + self.beyond, generator=generator)
        sign = torch.randint(2, (bias.width,), generator=generator) * 2 - 1
        self.order, self.sign = order.to(like.device), sign.to(like)

    def __call__(self, rows: Tensor) -> Tensor:
        filled = nn.functional.pad(rows * self.sign, (0, self.beyond))[:, self.order]
        return filled.unflatten(1, (-1, self.columns)).sum(1)


def _paired(numbers: Tensor) -> Tensor:
    """Two numbers of -7 to 7 a byte, ``(B, H)`` to ``(B, (H + 1) // 2)``."""
    even = nn.functional.pad(numbers + 8, (0, numbers.shape[1] % 2))
    return even[:, ::2] + 16 * even[:, 1::2]


def _apart(pairs: Tensor) -> Tensor:
    """The numbers in ``pairs`` of ``_paired``; one more at the end where their count was odd."""
    return torch.stack([pairs % 16, pairs // 16], 2).flatten(1).to(torch.int8) - 8


@functools.cache
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Hadamard's matrix ``(size, size)``, orthonormal; size: a power of two."""
    block = torch.ones(1, 1)
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return (block * size**-0.5).to(device, dtype)


def _with_room(rows: Tensor, count: int) -> Tensor:
    """The rows, with more of zeros behind them where there are fewer than ``count``."""
    if count <= len(rows):
        return rows
    return torch.cat(
        [rows, rows.new_zeros(max(count, len(rows) // 4 * 5) - len(rows), rows.shape[1])]
    )


def _columns(bias: Bias, rows: Tensor) -> Tensor:
    """Those of a bias among the columns of its parameter, ``(N, P)`` to ``(N, H)``."""
    parts = rows.unflatten(1, (bias.groups, -1))[:, :, bias.start : bias.stop]
    return parts.flatten(1)
