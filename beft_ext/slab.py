"""A slab: the gradients of single examples, kept row by row as backwards bring them.

Where the rows of a whole parameter would not fit, a sketch is kept of each bias: every element
goes, with a random sign, into one of few columns. Inner products of rows stay the same on average,
and the slab itself never exists.
Source: the count sketch, Charikar, Chen & Farach-Colton 2002.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from beft_ext.models import Bias
from beft_ext.ops import bias_example_grads


class SiteSlab:
    """Rows of one parameter's gradients, for its biases.

    Args:
        biases: of the parameter.
        like: a tensor ``(P,)`` with the dtype and device of the rows.
        examples: number of rows, N; more are made where they are needed.
        columns: width of a bias's sketch; a bias that is not wider is kept as it is.
        seed: of the sketches.
    """

    def __init__(
        self, biases: Sequence[Bias], like: Tensor, examples: int, columns: int | None, seed: int
    ) -> None:
        self.whole: Tensor | None = None
        self.sketches: dict[Bias, _Sketch] = {}
        if columns is None or all(b.width <= columns for b in biases):
            self.whole = like.new_zeros(examples, len(like))
        else:
            self.sketches = {b: _Sketch(b, like, examples, columns, seed) for b in biases}

    def take(self, row: int, dy: Tensor, offsets: Tensor | None, scale: float) -> Tensor:
        """Keep the gradients of a batch ``(B, T, H)``, or packed; returns their sum ``(P,)``.

        row: where the first example goes.
        """
        batch = len(dy) if offsets is None else len(offsets) - 1
        if self.whole is not None:
            self.whole = _with_room(self.whole, row + batch)
            out = self.whole[row : row + batch]
        else:
            out = next(iter(self.sketches.values())).rows.new_empty(batch, dy.shape[-1])
        bias_example_grads(dy, out, example_offsets=offsets, scale=scale)
        for sketch in self.sketches.values():
            sketch.put(row, out)
        return out.sum(0)

    def put(self, row: int, grads: Tensor) -> None:
        """Keep gradients ``(B, P)`` that are summed already."""
        if self.whole is not None:
            self.whole = _with_room(self.whole, row + len(grads))
            self.whole[row : row + len(grads)] = grads
        for sketch in self.sketches.values():
            sketch.put(row, grads)

    def rows(self, bias: Bias, count: int) -> Tensor:
        """The first ``count`` gradients of a bias ``(count, H)``, or their sketches."""
        if self.whole is None:
            return self.sketches[bias].rows[:count]
        return _columns(bias, self.whole[:count])


class _Sketch:
    """Rows of one bias, each ``(H,)`` folded into ``columns``: elements in a random order, with
    random signs, cut into pieces of that width that are added up."""

    def __init__(self, bias: Bias, like: Tensor, examples: int, columns: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + bias.layer)
        self.bias, self.columns = bias, columns
        self.beyond = -bias.width % columns  # zeros that fill the last piece
        order = torch.randperm(bias.width + self.beyond, generator=generator)
        sign = torch.randint(2, (bias.width,), generator=generator) * 2 - 1
        self.order, self.sign = order.to(like.device), sign.to(like)
        self.rows = like.new_zeros(examples, columns)

    def put(self, row: int, grads: Tensor) -> None:
        signed = _columns(self.bias, grads) * self.sign
        filled = nn.functional.pad(signed, (0, self.beyond))[:, self.order]
        self.rows = _with_room(self.rows, row + len(grads))
        self.rows[row : row + len(grads)] = filled.unflatten(1, (-1, self.columns)).sum(1)


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
