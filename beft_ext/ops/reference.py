"""What the operators compute, in plain torch: read this page first.

A formula is a function in the letters of its source; below it stands what feeds it. The reference
backend runs this page, and in float64 it is what every other backend is checked against.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from beft_ext.ops.bias_adamw_tables import AdamWTables


# bias_grad_stats: the gradient of a bias, and what each example says of it.


def example_grads(grad_output: Tensor, example_offsets: Tensor | None) -> Tensor:
    """Each example's bias gradient: ``g_i = sum_t dY[i, t, :]``.

    The bias is added to every token, so its gradient is the output's, summed over the tokens.

    Args:
        grad_output: ``dY``. Summed in float64 where it is float64, else in float32.
        example_offsets: example ``i`` is the rows ``offsets[i]:offsets[i + 1]``. Rows before the
            first and after the last offset belong to no example.
    Shape:
        grad_output ``(B, T, H)``, or ``(N, H)`` beside example_offsets ``(B + 1,)``.
    Returns: ``(B, H)``.
    """
    dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    if example_offsets is None:
        return grad_output.sum(1, dtype=dtype)
    lengths = example_offsets.diff()
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
    """``grad = sum_i g_i``, ``grad_sum += sum_i c g_i`` and ``grad_sum_sq += sum_i (c g_i)^2``.

    ``c`` is ``scale``, the number that the loss was divided by: ``c g_i`` is the gradient of
    example ``i``'s own loss, the ``g_i`` of docs/definitions.md. Over ``N`` examples
    ``grad_sum / N`` becomes the mean gradient, and ``grad_sum_sq / N`` the empirical Fisher
    information of each element.

    Shape: grad_output and example_offsets as in ``example_grads``; the other tensors ``(H,)``.
    Source: Kunstner et al. 2019 (arXiv 1905.12558), empirical Fisher; docs/definitions.md 2, 3.
    """
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


# bias_adamw_step: three formulas, then the step that applies them to all biases.


def adamw(
    theta: Tensor, m: Tensor, v: Tensor, g: Tensor, t: float,
    alpha: float, beta1: float, beta2: float, epsilon: float, decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Parameter and moments after step ``t``, counted from 1.

    Shape: theta, m, v and g are of one shape; so are the three that are returned.
    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), Algorithm 2; ``alpha`` is the rate, and
    ``decay`` is its lambda over the rate, as everywhere in torch.
    """
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    theta = theta - alpha * (m_hat / (v_hat.sqrt() + epsilon) + decay * theta)
    return theta, m, v


def clip_factor(norm: float, max_norm: float) -> float:
    """What brings a gradient of this norm to ``max_norm`` at most; 1 where ``max_norm`` is 0.

    Source: ``torch.nn.utils.clip_grad_norm_``, its 1e-6 included.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


def score_sums(b: Tensor, b0: Tensor, g: Tensor) -> Tensor:
    """``sum |d|``, ``<d, b0>``, ``<d, b>`` and ``|g|^2`` with the change ``d = b - b0``.

    The scores follow from them without a difference of two large numbers, as
    ``<b, b0> = |b0|^2 + <d, b0>`` and ``|b|^2 = |b0|^2 + <d, b0> + <d, b>``.

    Shape: b, b0 and g ``(n,)``. Returns ``(4,)``.
    Source: docs/definitions.md 4.
    """
    d = b - b0
    return torch.stack([d.abs().sum(), d.dot(b0), d.dot(b), g.dot(g)])


def bias_adamw_step(tables: AdamWTables) -> Tensor:
    """One step of every bias that has a gradient, block by block, as ``AdamWTables`` says.

    Returns: the norm of all gradients, unscaled and before clipping; infinity for a skipped step.
    """
    if tables.found_inf is not None and bool(tables.found_inf):
        return tables.state.new_full((), math.inf)
    unscale = 1.0 if tables.grad_scale is None else 1.0 / float(tables.grad_scale)
    blocks = _blocks(tables)
    norm = _norm([block.grad * unscale for block in blocks], tables.state)
    clipped_norm = norm if tables.global_norm is None else tables.global_norm
    clip = clip_factor(float(clipped_norm), tables.max_grad_norm)

    tables.steps.add_(tables.steps.new_tensor([float(g is not None) for g in tables.grads]))
    tables.scores[sorted({block.segment for block in blocks})] = 0
    for block in blocks:
        alpha, beta1, beta2, epsilon, decay, sign = _settings(tables, block.tensor)
        theta, m, v = adamw(
            _value(block), block.m, block.v, block.grad * (unscale * clip * sign),
            float(tables.steps[block.tensor]), alpha, beta1, beta2, epsilon, decay,
        )  # fmt: skip
        _write(block, theta, m, v)
        sums = score_sums(theta, block.initial, block.grad * unscale)
        tables.scores[block.segment] += sums.to(tables.scores.dtype)
    return norm


# The bookkeeping: where a block's elements lie.


class _Block(NamedTuple):
    """Consecutive elements of one bias: all that the step reads and writes, views ``(n,)``."""

    tensor: int
    segment: int
    param: Tensor
    grad: Tensor  # a copy, in the state's dtype
    m: Tensor
    v: Tensor
    initial: Tensor
    master: Tensor | None


def _blocks(tables: AdamWTables) -> list[_Block]:
    """The blocks of all tensors that have a gradient."""
    found = []
    for tensor, segment, at_param, at_grad, at_state, n in tables.blocks.tolist():
        param, grad = tables.params[tensor].detach(), tables.grads[tensor]
        if grad is None:
            continue
        part = param.as_strided((n,), (1,), param.storage_offset() + at_param)
        g = grad.reshape(-1)[at_grad : at_grad + n].to(tables.state.dtype)
        m, v, initial, *masters = tables.state[:, at_state : at_state + n].unbind()
        master = masters[0] if masters else None
        found.append(_Block(tensor, segment, part, g, m, v, initial, master))
    return found


def _norm(grads: list[Tensor], state: Tensor) -> Tensor:
    """The norm of all gradients together, a scalar of the state's dtype and device."""
    squares = [g.square().sum() for g in grads]
    return torch.stack(squares).sum().sqrt() if squares else state.new_zeros(())


def _settings(tables: AdamWTables, tensor: int) -> tuple[float, ...]:
    """Rate, both betas, epsilon, weight decay and sign (-1 to maximise) of the tensor's group."""
    group = tables.group_of[tensor]
    rate, *rest = tables.groups[6 * group : 6 * group + 6]
    return (rate if tables.lr is None else float(tables.lr[group]), *rest)


def _value(block: _Block) -> Tensor:
    """The bias before the step, in the state's dtype. A half-precision parameter has the digits
    that it lacks in its master; where the two disagree, the parameter was written and holds."""
    value = block.param.to(block.m.dtype)
    if block.master is None or block.param.dtype not in (torch.bfloat16, torch.float16):
        return value
    return torch.where(block.master.to(block.param.dtype) == block.param, block.master, value)


def _write(block: _Block, theta: Tensor, m: Tensor, v: Tensor) -> None:
    block.param.copy_(theta)
    block.m.copy_(m)
    block.v.copy_(v)
    if block.master is not None:
        block.master.copy_(theta)
