"""``bias_adamw_step``: one AdamW step over all biases, with each bias's scores from one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

from beft_ext.ops import checks, dispatch, reference
from beft_ext.ops.bias_adamw_tables import (
    BLOCK,
    AdamWTables,
    Located,
    locate,
    packed_addresses,
    reach,
    workspace_size,
)
from beft_ext.ops.checks import DTYPE_CODES, OperatorError


def bias_adamw_step(tables: AdamWTables) -> Tensor:
    """One step of all tensors of a device. The caller answers for the tables: BiasAdamW does.

    It goes straight to the backend: boxing some 200 tensors for the dispatcher, and checks that
    the caller has made once for all steps, would cost a third of the step.

    Returns:
        The norm of all these gradients, unscaled and before clipping, a scalar; infinity where
        ``found_inf`` is set.
    Raises:
        BackendError: where a forced backend does not read this device's memory.
    Source: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101).
    """
    name = dispatch.choose(tables.state.device)
    if not tables.blocks.numel():
        return tables.state.new_zeros(())
    return _BACKENDS["reference" if tables.state.dtype == torch.float64 else name](tables)


# A definition of its own, not torch.library.custom_op: that one's wrapper costs more than the step.
_LIBRARY = torch.library.Library("beft_ext", "FRAGMENT")
_LIBRARY.define(
    "bias_adamw_step(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!) state, Tensor(c!) steps, "
    "Tensor(d!) scores, Tensor blocks, Tensor first_blocks, int[] group_of, float[] groups, "
    "Tensor? lr, float max_grad_norm, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(e!) workspace, Tensor? global_norm=None) -> Tensor"
)


def _op(*arguments: Any) -> Tensor:
    """The operator as anyone may call it: whatever does not fit is an OperatorError."""
    tables = _gathered(AdamWTables(*arguments))
    norm = bias_adamw_step(tables)
    written = (*tables.params, tables.state, tables.steps, tables.scores, tables.workspace)
    torch.autograd.graph.increment_version(written)
    return norm


def _op_negative(*arguments: Any) -> Tensor:
    """The operator where an argument is the negative of its memory, which is refused. (torch's
    own handling of the negative bit ends in an internal assertion for what is mutated.)"""
    _check(AdamWTables(*arguments))
    return _op(*arguments)


def _fake(*arguments: Any) -> Tensor:
    tables = AdamWTables(*arguments)
    # Dynamo would bury the error in a page of its own: a compiled call is refused when it runs.
    if TracingContext.try_get() is None:
        _check_buffers(tables)
        _check_tensors(tables)
    return tables.state.new_empty(())


_LIBRARY.impl("bias_adamw_step", _op, "CompositeExplicitAutograd")
_LIBRARY.impl("bias_adamw_step", _op_negative, "Negative")
torch.library.register_fake("beft_ext::bias_adamw_step", _fake, lib=_LIBRARY)


def _gathered(t: AdamWTables) -> AdamWTables:
    """The tables with all that kernels are told of parameters and gradients, once they fit."""
    found = None
    if dispatch.native is not None:
        found = dispatch.native.bias_adamw_step_gather(t, BLOCK)
    if found is None:  # to be told why, or where there is no native module
        _check(t)
        return t._replace(params=locate(t.params, t.group_of), grads=Located(t.grads))
    params, grads, forms = found
    return AdamWTables(Located(t.params, params, forms), Located(t.grads, grads), *t[2:])


def _check(t: AdamWTables) -> None:
    """AdamWTables::fit of csrc/adamw_tables.h, and whether a sign is turned; it says what is
    wrong."""
    _check_buffers(t)
    _check_tensors(t)
    # Not read on a GPU: the host would have to wait for it, and the kernels bring each block
    # inside of what it names.
    if not t.state.is_cuda and not _blocks_fit(t):
        raise OperatorError(
            "blocks and first_blocks do not fit the tensors: an entry names a tensor, a segment "
            "or elements that are not there, is not among its segment's or is of more than "
            f"{BLOCK} elements"
        )


def _check_buffers(t: AdamWTables) -> None:
    """All but the tensors, and the numbers within the tables of blocks."""
    double = t.state.dtype == torch.float64
    dtype, device = torch.float64 if double else torch.float32, t.state.device
    rows, elements = t.state.shape if t.state.ndim == 2 else (0, 0)
    checks.require("state", t.state, (min(max(rows, 3), 4), elements), dtype, device)
    count, segments = t.blocks.shape[0] if t.blocks.ndim else 0, t.first_blocks.numel() - 1
    if segments < (1 if count else 0):
        raise OperatorError("first_blocks must hold the first block of each segment and the end")
    groups = len(t.groups) // 6
    checks.require("steps", t.steps, (len(t.params),), torch.float32, device)
    checks.require("scores", t.scores, (segments, 4), torch.float32, device)
    checks.require("blocks", t.blocks, (count, 6), torch.int64, device)
    checks.require("first_blocks", t.first_blocks, (segments + 1,), torch.int64, device)
    size = (workspace_size(count, segments),)
    checks.require("workspace", t.workspace, size, torch.float32, device)
    if t.lr is not None:
        checks.require("lr", t.lr, (groups,), torch.float32, device)
    for name in ("grad_scale", "found_inf", "global_norm"):
        scalar = getattr(t, name)
        if scalar is not None:
            one = scalar.shape if scalar.numel() == 1 else ()
            checks.require(name, scalar, one, torch.float32, device)
    if not 0 <= t.max_grad_norm < math.inf:
        raise OperatorError(f"max_grad_norm must be 0 (no clipping) or more: {t.max_grad_norm}")
    if len(t.groups) % 6 or any(not 0 <= g < groups for g in t.group_of):
        raise OperatorError(f"group_of must name one of the {groups} groups, of six numbers each")
    if not len(t.params) == len(t.grads) == len(t.group_of):
        raise OperatorError("params, grads and group_of must have one entry a tensor")


def _check_tensors(t: AdamWTables) -> None:
    for i, (p, g) in enumerate(zip(t.params, t.grads, strict=True)):
        half = p.dtype in (torch.bfloat16, torch.float16)
        fits = p.dtype in DTYPE_CODES or p.dtype == t.state.dtype
        if not fits or p.device != t.state.device or p.layout is not torch.strided or p.is_neg():
            raise OperatorError(
                f"params[{i}] must be a plain float tensor on {t.state.device} (fp64 beside an "
                f"fp64 state), but is {checks.described(p)}"
            )
        if half and t.state.shape[0] != 4:
            raise OperatorError(f"params[{i}] is {p.dtype}: state needs a fourth row for masters")
        if g is not None:
            shape = g.shape if g.numel() == p.numel() else p.shape
            checks.require(f"grads[{i}]", g, shape, p.dtype, p.device)


def _blocks_fit(t: AdamWTables) -> bool:
    """``table_fits`` of csrc/bias_adamw_step.h: that the kernels stay within their buffers."""
    elements = t.state.shape[1]
    first, rows = t.first_blocks.tolist(), t.blocks.tolist()
    if first[0] != 0 or first[-1] != len(rows) or any(a > b for a, b in itertools.pairwise(first)):
        return False
    owners = [s for s, (a, b) in enumerate(itertools.pairwise(first)) for _ in range(a, b)]
    for (tensor, segment, *offsets, length), owner in zip(rows, owners, strict=True):
        if segment != owner or not 0 <= tensor < len(t.params) or not 1 <= length <= BLOCK:
            return False
        p = t.params[tensor]
        for offset, size in zip(offsets, (reach(p), p.numel(), elements), strict=True):
            if not 0 <= offset <= size - length:
                return False
        if tensor != rows[first[segment]][0]:
            return False
    return True


def _cpu(t: AdamWTables) -> Tensor:
    assert dispatch.native is not None and isinstance(t.params, Located)
    if t.found_inf is not None and bool(t.found_inf):
        return t.state.new_full((), math.inf)
    groups = t.groups
    if t.lr is not None:
        groups = [x if i % 6 else float(t.lr[i // 6]) for i, x in enumerate(groups)]
    norm = dispatch.native.bias_adamw_step_cpu(
        t.params.addresses,
        packed_addresses(t.grads),
        t.params.forms,
        groups,
        t.blocks,
        t.state,
        t.steps,
        t.scores,
        t.max_grad_norm,
        -1.0 if t.global_norm is None else float(t.global_norm),
        1.0 if t.grad_scale is None else 1.0 / float(t.grad_scale),
        torch.get_num_threads(),
    )
    return torch.scalar_tensor(norm, dtype=torch.float32, device=t.state.device)


def _cuda(t: AdamWTables) -> Tensor:
    assert dispatch.native is not None and isinstance(t.params, Located)
    most_tensors, most_groups = dispatch.native.bias_adamw_step_limits
    if len(t.params) > most_tensors or len(t.groups) > 6 * most_groups:
        raise OperatorError(
            f"the CUDA step takes at most {most_tensors} tensors in {most_groups} groups: train "
            "fewer terms, or set_backend('triton')"
        )
    norm = t.state.new_empty(())
    scalars = (t.grad_scale, t.found_inf)
    with torch.cuda.device(t.state.device):
        dispatch.native.bias_adamw_step_cuda(
            t.params.addresses,
            packed_addresses(t.grads),
            t.params.forms,
            t.groups,
            t.blocks.data_ptr(),
            t.blocks.shape[0],
            t.first_blocks.data_ptr(),
            len(t.first_blocks) - 1,
            t.state.data_ptr(),
            t.state.shape[1],
            t.steps.data_ptr(),
            t.scores.data_ptr(),
            t.workspace.data_ptr(),
            norm.data_ptr(),
            0 if t.lr is None else t.lr.data_ptr(),
            t.max_grad_norm,
            0 if t.global_norm is None else t.global_norm.data_ptr(),
            *(0 if s is None else s.data_ptr() for s in scalars),
            torch.cuda.current_stream().cuda_stream,
        )
    return norm


def _triton(t: AdamWTables) -> Tensor:
    from beft_ext.ops.triton_bias_adamw_step import bias_adamw_step_triton

    norm: Tensor = bias_adamw_step_triton(t)
    return norm


_BACKENDS: dict[str, Callable[[AdamWTables], Tensor]] = {
    "reference": reference.bias_adamw_step,
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}
