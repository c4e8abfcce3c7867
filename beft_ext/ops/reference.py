"""The operators in plain torch: what every other backend is checked against in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from beft_ext.ops.bias_adamw_tables import AdamWTables


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


def bias_example_grads(
    grad_output: Tensor, example_offsets: Tensor | None, scale: float, out: Tensor
) -> None:
    """Same contract as the compiled backends: fills ``out``."""
    out.copy_(example_grads(grad_output, example_offsets) * scale)


def adamw(
    theta: Tensor, m: Tensor, v: Tensor, g: Tensor, t: float,
    alpha: float, beta1: float, beta2: float, epsilon: float, decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Parameter and moments after step ``t``, in the letters of AdamW's paper.

    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), Algorithm 2; ``alpha`` is the rate, and
    ``decay`` is its lambda over the rate, as everywhere in torch.
    """
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return theta - alpha * (m_hat / (v_hat.sqrt() + epsilon) + decay * theta), m, v


def bias_adamw_step(tables: AdamWTables) -> Tensor:
    """Same contract as the compiled backends, block by block."""
    t = tables
    if t.found_inf is not None and bool(t.found_inf):
        return t.state.new_full((), math.inf)
    unscale = 1.0 if t.grad_scale is None else 1.0 / float(t.grad_scale)
    work = [(row, *_run(t, row)) for row in t.blocks.tolist()]
    squares = [(g * unscale).square().sum() for *_, g in work if g is not None]
    norm = torch.stack(squares).sum().sqrt() if squares else t.state.new_zeros(())
    clip = 1.0
    if t.max_grad_norm > 0:
        by = float(norm if t.global_norm is None else t.global_norm)
        clip = min(1.0, t.max_grad_norm / (by + 1e-6))
    t.steps.add_(t.steps.new_tensor([float(g is not None) for g in t.grads]))
    stepped = {segment for (_, segment, *_), *_, g in work if g is not None}
    t.scores[sorted(stepped)] = 0
    for (tensor, segment, *_), param, rows, g in work:
        if g is None:
            continue
        group = t.group_of[tensor]
        rate, beta1, beta2, eps, decay, sign = t.groups[6 * group : 6 * group + 6]
        rate = rate if t.lr is None else float(t.lr[group])
        before = param.to(t.state.dtype)
        if param.dtype in (torch.bfloat16, torch.float16):
            before = torch.where(rows[3].to(param.dtype) == param, rows[3], before)
        b, rows[0], rows[1] = adamw(
            before, rows[0], rows[1], g * (unscale * clip * sign), float(t.steps[tensor]),
            rate, beta1, beta2, eps, decay,
        )  # fmt: skip
        param.copy_(b)
        if len(rows) == 4:
            rows[3] = b
        d, raw = b - rows[2], g * unscale
        sums = [d.abs().sum(), d.dot(rows[2]), d.dot(b), raw.dot(raw)]
        t.scores[segment] += torch.stack(sums).to(t.scores.dtype)
    return norm


def _run(t: AdamWTables, row: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The elements of one block: of the parameter, the state's rows, the gradient (or None)."""
    tensor, _, at_param, at_grad, at_flat, n = row
    param, grad = t.params[tensor].detach(), t.grads[tensor]
    b = param.as_strided((n,), (1,), param.storage_offset() + at_param)
    g = None if grad is None else grad.reshape(-1)[at_grad : at_grad + n].to(t.state.dtype)
    return b, t.state[:, at_flat : at_flat + n], g
