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


def bias_adamw_step(  # type: ignore[no-untyped-def]
    params, grads, state, steps, scores, blocks, first_blocks, group_of, groups, lr,
    max_norm, grad_scale, found_inf, workspace,
) -> Tensor:  # fmt: skip
    """Same contract as the compiled backends, one torch.optim.AdamW formula at a time."""
    work = [(row.tolist(), _run_of(row, params, grads, state)) for row in blocks]
    unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    squares = [g.square().sum() * unscale**2 for _, (_, g, _) in work if g is not None]
    norm = torch.stack(squares).sum().sqrt() if squares else state.new_zeros(())
    if found_inf is not None and bool(found_inf):
        return norm
    clip = min(1.0, max_norm / (float(norm) + 1e-6)) if max_norm > 0 else 1.0
    steps += steps.new_tensor([float(g is not None) for g in grads])
    touched: set[int] = set()
    for (tensor, segment, *_), (b, g, s) in work:
        if g is None:
            continue
        rate, beta1, beta2, eps, decay, sign = groups[6 * group_of[tensor] :][:6]
        rate = rate if lr is None else float(lr[group_of[tensor]])
        step, value, raw = float(steps[tensor]), s[-1].clone() if len(s) == 4 else b, g * unscale
        value = value if b.dtype in (torch.bfloat16, torch.float16) else b.to(s.dtype)
        clipped = raw * clip * sign
        s[0].lerp_(clipped, 1 - beta1)
        s[1].mul_(beta2).addcmul_(clipped, clipped, value=1 - beta2)
        root = (s[1] / (1 - beta2**step)).sqrt() + eps
        value = value * (1 - rate * decay) - rate / (1 - beta1**step) * s[0] / root
        b.copy_(value)
        if len(s) == 4:
            s[3].copy_(value)
        if segment not in touched:
            touched.add(segment)
            scores[segment] = 0
        d = value - s[2]
        sums = [d.abs().sum(), d.dot(s[2]), d.dot(d), raw.dot(raw)]
        scores[segment] += torch.stack(sums).to(scores.dtype)
    return norm


def _run_of(row, params, grads, state):  # type: ignore[no-untyped-def]
    """The elements of one block: of the parameter, the gradient (or None), the state's rows."""
    tensor, _, at_param, at_grad, at_flat, n = row.tolist()
    param, grad = params[tensor].detach(), grads[tensor]
    b = param.as_strided((n,), (1,), param.storage_offset() + at_param)
    g = None if grad is None else grad.view(-1)[at_grad : at_grad + n].to(state.dtype)
    return b, g, state[:, at_flat : at_flat + n]
