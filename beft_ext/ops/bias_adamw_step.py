"""``bias_adamw_step``: one AdamW step over all biases, with each bias's scores from one pass."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from beft_ext.ops import dispatch, reference

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# A definition of its own, not torch.library.custom_op: that one's wrapper costs more than the step.
_LIBRARY = torch.library.Library("beft_ext", "FRAGMENT")
_LIBRARY.define(
    "bias_adamw_step(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!) state, Tensor(c!) steps, "
    "Tensor(d!) scores, Tensor blocks, Tensor first_blocks, int[] group_of, float[] groups, "
    "Tensor? lr, float max_norm, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(e!) workspace) -> Tensor"
)


def _step(  # type: ignore[no-untyped-def]
    params, grads, state, steps, scores, blocks, first_blocks, group_of, groups, lr,
    max_norm, grad_scale, found_inf, workspace,
) -> Tensor:  # fmt: skip
    run = _BACKENDS["reference" if state.dtype == torch.float64 else _backend(state)]
    return run(
        params, grads, state, steps, scores, blocks, first_blocks, group_of, groups, lr,
        max_norm, grad_scale, found_inf, workspace,
    )  # fmt: skip


_LIBRARY.impl("bias_adamw_step", _step, "CompositeExplicitAutograd")


def _fake(params, grads, state, *_: object) -> Tensor:  # type: ignore[no-untyped-def]
    norm: Tensor = state.new_empty(())
    return norm


torch.library.register_fake("beft_ext::bias_adamw_step", _fake, lib=_LIBRARY)


class Located(list[Any]):
    """Tensors, or None, with the addresses at which they lie: asking each costs as much as the
    kernel's work on it, so it is asked once a step."""

    def __init__(self, tensors: Iterable[Tensor | None], addresses: bytes) -> None:
        super().__init__(tensors)
        self.addresses = addresses


def locate(tensors: list[Tensor | None]) -> bytes:
    """Where tensors lie now, eight bytes each; 0 for None."""
    if dispatch.native is not None:
        return dispatch.native.addresses(tensors)
    return array("Q", [0 if t is None else t.data_ptr() for t in tensors]).tobytes()


def gradients(params: list[Tensor]) -> list[Tensor | None]:
    """Each parameter's gradient or None; Located where all are known to be contiguous."""
    if dispatch.native is None:
        return [p.grad for p in params]
    grads, addresses = dispatch.native.gradients(params)
    return grads if addresses is None else Located(grads, addresses)


def _addresses(tensors: list[Tensor | None]) -> bytes:
    return tensors.addresses if isinstance(tensors, Located) else locate(tensors)


def workspace_size(blocks: int, segments: int) -> int:
    """Floats of scratch: four sums a block; and the CUDA kernel's counters."""
    return 4 * blocks + segments + 1


def bias_adamw_step(
    params: list[Tensor],
    grads: Sequence[Tensor | None],
    state: Tensor,
    steps: Tensor,
    scores: Tensor,
    blocks: Tensor,
    first_blocks: Tensor,
    group_of: Sequence[int],
    groups: Sequence[float],
    workspace: Tensor,
    *,
    lr: Tensor | None = None,
    max_norm: float = 0.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """One step of all tensors of a device. Everything is checked by the caller, BiasAdamW.

    params, grads: fp32, bf16 or fp16; a gradient has its parameter's dtype, is contiguous, or
        is None: that tensor is left alone and its step not counted.
    state: ``(3, N)`` fp32 rows ``exp_avg``, ``exp_avg_sq``, ``initial``; a fourth row, the fp32
        master copies, where a parameter is half precision. Updated in place.
    steps: ``(tensors,)`` fp32, counts of steps taken. scores: ``(segments, 4)`` fp32, written:
        ``sum|d|``, ``<d, b0>``, ``|d|^2`` with ``d = b - b0``, and ``|g|^2`` (unscaled, before
        clipping), per segment.
    blocks: ``(blocks, 6)`` int64: tensor, segment, offsets into parameter, gradient and flat
        state, length (at most 1024); those of one segment are consecutive.
        first_blocks: ``(segments + 1,)`` int64.
    groups: six numbers a parameter group: lr, beta1, beta2, eps, weight decay, and -1 to
        maximise or 1. group_of: a tensor's group. lr: ``(groups,)`` fp32 on the device, in place
        of the groups' own (for CUDA graphs).
    workspace: ``(workspace_size(blocks, segments),)`` fp32, zero before the first call.
    max_norm: of the global gradient norm; 0 for no clipping.
    grad_scale, found_inf: scalars of a GradScaler: gradients are divided by the first; where
        the second is not zero nothing is written.
    Returns the global norm of the unscaled gradient, before clipping, a scalar.
    Source: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101); DESIGN section 5.
    """
    # In eager mode straight to the backend: boxing some 200 tensors for the dispatcher would
    # cost a third of the step.
    run = torch.ops.beft_ext.bias_adamw_step if torch.compiler.is_compiling() else _step
    norm: Tensor = run(
        params, grads, state, steps, scores, blocks, first_blocks, group_of, groups, lr,
        max_norm, grad_scale, found_inf, workspace,
    )  # fmt: skip
    return norm


def _backend(state: Tensor) -> str:
    return dispatch.choose(state.device.type)


def _cpu(  # type: ignore[no-untyped-def]
    params, grads, state, steps, scores, blocks, first_blocks, group_of, groups, lr,
    max_norm, grad_scale, found_inf, workspace,
) -> Tensor:  # fmt: skip
    assert dispatch.native is not None
    if found_inf is not None and bool(found_inf):
        return state.new_full((), float("inf"))
    if lr is not None:
        groups = [x if i % 6 else float(lr[i // 6]) for i, x in enumerate(groups)]
    rows, elements = state.shape
    half = rows == 4
    norm = dispatch.native.bias_adamw_cpu(
        _addresses(params),
        _addresses(grads),
        [DTYPES[p.dtype] for p in params] if half else [0] * len(params),
        group_of,
        groups,
        blocks.data_ptr(),
        blocks.shape[0],
        state.data_ptr(),
        elements,
        half,
        steps.data_ptr(),
        scores.data_ptr(),
        max_norm,
        1.0 if grad_scale is None else 1.0 / float(grad_scale),
        torch.get_num_threads(),
    )
    return torch.scalar_tensor(norm, dtype=torch.float32)


def _cuda(  # type: ignore[no-untyped-def]
    params, grads, state, steps, scores, blocks, first_blocks, group_of, groups, lr,
    max_norm, grad_scale, found_inf, workspace,
) -> Tensor:  # fmt: skip
    assert dispatch.native is not None
    most_tensors, most_groups = dispatch.native.bias_adamw_limits
    if len(params) > most_tensors or len(groups) > 6 * most_groups:
        raise ValueError(
            f"the CUDA step takes at most {most_tensors} tensors in {most_groups} groups: train "
            "fewer terms, or set_backend('triton')"
        )
    norm = state.new_empty(())
    with torch.cuda.device(state.device):
        dispatch.native.bias_adamw_cuda(
            _addresses(params),
            _addresses(grads),
            [DTYPES[p.dtype] for p in params],
            group_of,
            groups,
            blocks.data_ptr(),
            len(blocks),
            first_blocks.data_ptr(),
            len(first_blocks) - 1,
            state.data_ptr(),
            state.shape[1],
            steps.data_ptr(),
            scores.data_ptr(),
            workspace.data_ptr(),
            norm.data_ptr(),
            0 if lr is None else lr.data_ptr(),
            max_norm,
            0 if grad_scale is None else grad_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return norm


def _triton(*arguments: Any) -> Tensor:
    from beft_ext.ops.triton_bias_adamw_step import bias_adamw_triton

    norm: Tensor = bias_adamw_triton(*arguments)
    return norm


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.bias_adamw_step,
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}
