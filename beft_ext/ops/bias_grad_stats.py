"""``bias_grad_stats``: bias gradient, mean and per-example Fisher from one read of dY."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from beft_ext.ops import dispatch, reference

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@torch.library.custom_op("beft_ext::bias_grad_stats", mutates_args=("grad_sum", "grad_sum_sq"))
def _op(
    grad_output: Tensor,
    example_offsets: Tensor | None,
    scale: float,
    grad_sum: Tensor,
    grad_sum_sq: Tensor,
) -> Tensor:
    return _run(grad_output, example_offsets, scale, grad_sum, grad_sum_sq)


def _run(
    grad_output: Tensor,
    example_offsets: Tensor | None,
    scale: float,
    grad_sum: Tensor,
    grad_sum_sq: Tensor,
) -> Tensor:
    grad = torch.empty_like(grad_sum)
    backend = _BACKENDS[_backend(grad_output)]
    backend(grad_output, example_offsets, scale, grad, grad_sum, grad_sum_sq)
    return grad


@_op.register_fake
def _(grad_output, example_offsets, scale, grad_sum, grad_sum_sq):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad_sum)


def bias_grad_stats(
    grad_output: Tensor,
    grad_sum: Tensor,
    grad_sum_sq: Tensor,
    *,
    example_offsets: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Bias gradient of a projection, and its per-example statistics, in one read.

    grad_output: ``(B, T, H)``, or ``(N, H)`` with ``example_offsets``; any strides;
        fp32, bf16 or fp16 (fp64 runs on the reference backend).
    grad_sum, grad_sum_sq: ``(H,)`` contiguous fp32 (fp64 for fp64 input), added to in place:
        ``sum_i scale*g_i`` and ``sum_i (scale*g_i)^2`` with ``g_i = sum_t grad_output[i, t]``.
    example_offsets: ``(B + 1,)`` int64, ascending, within ``[0, N]``; example i is rows
        ``offsets[i]:offsets[i + 1]``; rows outside belong to no example and are not summed.
    scale: undoes the loss's mean (``B`` for a mean over examples).
    Returns ``sum_i g_i``, ``(H,)`` in the buffers' dtype, unscaled. Bitwise reproducible.
    Raises ValueError for shapes, dtypes, devices or offsets that do not fit.
    Source: DESIGN section 3, per-example Fisher; Huang et al. 2025 (arXiv 2509.15974).
    """
    _check(grad_output, grad_sum, grad_sum_sq, example_offsets)
    if _needs_dispatcher(grad_output):
        grad: Tensor = _op(grad_output, example_offsets, scale, grad_sum, grad_sum_sq)
        return grad
    grad = _run(grad_output, example_offsets, scale, grad_sum, grad_sum_sq)
    # The kernels write through raw addresses; autograd must learn of it.
    torch.autograd.graph.increment_version((grad_sum, grad_sum_sq))
    return grad


def _needs_dispatcher(grad_output: Tensor) -> bool:
    """Whether someone listens to operators: a compiler, autograd (which then refuses to go back
    through this one), a tensor subclass or a mode. For a small bias the dispatcher's wrapper costs
    several times the work itself."""
    return (
        torch.compiler.is_compiling()
        or (grad_output.requires_grad and torch.is_grad_enabled())
        or type(grad_output) is not Tensor
        or is_in_torch_dispatch_mode()
    )


def _check(dy: Tensor, grad_sum: Tensor, grad_sum_sq: Tensor, offsets: Tensor | None) -> None:
    expected = 3 if offsets is None else 2
    if dy.ndim != expected:
        shape = "(B, T, H)" if offsets is None else "(N, H) beside example_offsets"
        raise ValueError(f"grad_output must be {shape}, but its shape is {tuple(dy.shape)}")
    if dy.dtype not in _DTYPES and dy.dtype != torch.float64:
        raise ValueError(f"grad_output must be a float tensor, but its dtype is {dy.dtype}")
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    for name, buffer in (("grad_sum", grad_sum), ("grad_sum_sq", grad_sum_sq)):
        if tuple(buffer.shape) != tuple(dy.shape[-1:]) or not buffer.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous of shape ({dy.shape[-1]},), "
                f"but its shape is {tuple(buffer.shape)}"
            )
        if buffer.dtype != dtype or buffer.device != dy.device:
            raise ValueError(
                f"{name} must be {dtype} on {dy.device}, but is {buffer.dtype} on {buffer.device}"
            )
    if offsets is not None and not torch.compiler.is_compiling():
        _check_offsets(offsets, dy)


def _check_offsets(offsets: Tensor, dy: Tensor) -> None:
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or not offsets.is_contiguous():
        raise ValueError("example_offsets must be a contiguous int64 vector of B + 1 entries")
    if len(offsets) == 0 or offsets.device != dy.device:
        raise ValueError(f"example_offsets needs at least one entry, on {dy.device}")
    if offsets.is_cuda:
        return  # reading them would make the host wait for the GPU; the kernels clamp instead
    if offsets[0] < 0 or offsets[-1] > len(dy) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"example_offsets must ascend within [0, {len(dy)}]")


def _backend(grad_output: Tensor) -> str:
    if grad_output.dtype == torch.float64:
        return "reference"
    return dispatch.choose(grad_output.device.type)


def _layout(dy: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """dtype, batch, tokens, width, the three strides, and the offsets' address (0: none)."""
    dtype = _DTYPES[dy.dtype]
    if offsets is None:
        return (dtype, *dy.shape, *dy.stride(), 0)
    return (dtype, len(offsets) - 1, *dy.shape, 0, *dy.stride(), offsets.data_ptr())


def _cpu(
    dy: Tensor, offsets: Tensor | None, scale: float, grad: Tensor, total: Tensor, total_sq: Tensor
) -> None:
    assert dispatch.native is not None
    pointers = [t.data_ptr() for t in (grad, total, total_sq)]
    dispatch.native.bias_grad_stats_cpu(
        dy.data_ptr(), *_layout(dy, offsets), scale, torch.get_num_threads(), *pointers
    )


def _cuda(
    dy: Tensor, offsets: Tensor | None, scale: float, grad: Tensor, total: Tensor, total_sq: Tensor
) -> None:
    assert dispatch.native is not None
    layout = _layout(dy, offsets)
    with torch.cuda.device(dy.device):
        floats = dispatch.native.bias_grad_stats_workspace(*layout[1:4])
        workspace = torch.empty(floats, dtype=torch.float32, device=dy.device)
        pointers = [t.data_ptr() for t in (workspace, grad, total, total_sq)]
        stream = torch.cuda.current_stream().cuda_stream
        dispatch.native.bias_grad_stats_cuda(dy.data_ptr(), *layout, scale, *pointers, stream)


def _triton(
    dy: Tensor, offsets: Tensor | None, scale: float, grad: Tensor, total: Tensor, total_sq: Tensor
) -> None:
    from beft_ext.ops.triton_bias_grad_stats import bias_grad_stats_triton

    bias_grad_stats_triton(dy, offsets, scale, grad, total, total_sq)


_BACKENDS = {
    "reference": reference.bias_grad_stats,
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}
