"""The operators in plain torch: what every other backend is checked against in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def example_grads(grad_output: Tensor, example_offsets: Tensor | None) -> Tensor:
    """Each example's bias gradient, ``(B, H)``: its rows of ``grad_output`` added up.

    Summed in float64 where the input is float64, else in float32.
    """
    dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    if example_offsets is None:
        return grad_output.sum(1, dtype=dtype)
    lengths = example_offsets.diff()
    # Rows before the first and after the last offset belong to no example.
    rows = grad_output[int(example_offsets[0]) : int(example_offsets[-1])].to(dtype)
    index = torch.repeat_interleave(lengths)
    return rows.new_zeros(len(lengths), rows.shape[1]).index_add_(0, index, rows)


def bias_grad_stats(
    grad_output: Tensor,
    example_offsets: Tensor | None,
    scale: float,
    grad: Tensor,
    grad_sum: Tensor,
    grad_sum_sq: Tensor,
) -> None:
    """Same contract as the compiled backends: fills ``grad``, adds to the two buffers."""
    grads = example_grads(grad_output, example_offsets)
    total = grads.sum(0)
    grad.copy_(total)
    grad_sum.add_(total, alpha=scale)
    grad_sum_sq.add_((grads * scale).square().sum(0))
