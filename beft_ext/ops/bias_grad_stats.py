"""``bias_grad_stats``: bias gradient, mean and per-example Fisher from one read of dY."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import TracingContext

from beft_ext.ops import checks, dispatch, grad_output as inputs, reference
from beft_ext.ops.checks import OperatorError
from beft_ext.ops.grad_output import GradOutput


def _run(
    grad_output: Tensor,
    example_offsets: Tensor | None,
    scale: float,
    grad_sum: Tensor,
    grad_sum_sq: Tensor,
) -> Tensor:
    written = grad_sum, grad_sum_sq
    name, read = inputs.readable(
        "bias_grad_stats_arguments", _check, grad_output, example_offsets, scale, *written
    )
    grad = torch.empty_like(grad_sum)
    _BACKENDS[name](read, grad, *written)
    return grad


_op = torch.library.custom_op(
    "beft_ext::bias_grad_stats", _run, mutates_args=("grad_sum", "grad_sum_sq")
)


@_op.register_fake
def _fake(
    grad_output: Tensor,
    example_offsets: Tensor | None,
    scale: float,
    grad_sum: Tensor,
    grad_sum_sq: Tensor,
) -> Tensor:
    # Dynamo would bury the error in a page of its own: a compiled call is refused when it runs.
    if TracingContext.try_get() is None:
        _check(grad_output, example_offsets, grad_sum, grad_sum_sq)
    return torch.empty_like(grad_sum)


# torch's own handling of the negative bit ends in an internal assertion for what is mutated.
_LIBRARY = torch.library.Library("beft_ext", "FRAGMENT")
_LIBRARY.impl("bias_grad_stats", torch.library.fallthrough_kernel, "Negative")


def bias_grad_stats(
    grad_output: Tensor,
    grad_sum: Tensor,
    grad_sum_sq: Tensor,
    *,
    example_offsets: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Bias gradient of a projection and its per-example statistics, from one read.

    With ``g_i = sum_t grad_output[i, t]``, the gradient of example ``i``, the operator returns
    ``sum_i g_i`` and adds ``sum_i scale * g_i`` and ``sum_i (scale * g_i)^2`` to two buffers.
    The result is the same to the bit on every run.

    Args:
        grad_output: gradient at the projection's output, fp32, bf16 or fp16, any strides. fp64
            runs on the reference backend.
        grad_sum, grad_sum_sq: contiguous fp32 (fp64 for fp64 input), added to in place. They
            must not overlap.
        example_offsets: int64, ascending, within ``[0, N]``. Example ``i`` is the rows
            ``offsets[i]:offsets[i + 1]``; other rows belong to no example and are left out.
            On a GPU wrong values are clamped to this range, since to read them would make the
            host wait.
        scale: the number that the loss was divided by (``B`` for a mean over examples).
    Shape:
        grad_output ``(B, T, H)``, or ``(N, H)`` beside example_offsets ``(B + 1,)``;
        grad_sum, grad_sum_sq ``(H,)``.
    Returns:
        The bias gradient ``(H,)``, unscaled, in the buffers' dtype.
    Raises:
        OperatorError: (a ValueError) for shapes, dtypes, devices or offsets that do not fit.
        BackendError: where a forced backend does not read this device's memory.
    Source: Huang et al. 2025 (arXiv 2509.15974); per-example Fisher information.
    """
    if inputs.needs_dispatcher(grad_output, grad_sum, grad_sum_sq):
        grad: Tensor = _op(grad_output, example_offsets, scale, grad_sum, grad_sum_sq)
        return grad
    grad = _run(grad_output, example_offsets, scale, grad_sum, grad_sum_sq)
    # The kernels write through raw addresses; autograd must learn of it.
    torch.autograd.graph.increment_version((grad_sum, grad_sum_sq))
    return grad


def _check(dy: Tensor, offsets: Tensor | None, grad_sum: Tensor, grad_sum_sq: Tensor) -> None:
    _, width, dtype = inputs.check(dy, offsets)
    checks.require("grad_sum", grad_sum, (width,), dtype, dy.device)
    checks.require("grad_sum_sq", grad_sum_sq, (width,), dtype, dy.device)
    if checks.overlap(grad_sum, grad_sum_sq):
        raise OperatorError("grad_sum and grad_sum_sq must not share memory")


def _reference(read: GradOutput, grad: Tensor, total: Tensor, total_sq: Tensor) -> None:
    inputs.check_values(read)
    reference.bias_grad_stats(*read[:3], grad, total, total_sq)


def _cpu(read: GradOutput, grad: Tensor, *_: Tensor) -> None:
    assert dispatch.native is not None and read.numbers is not None
    *layout, to_sum, to_squares = read.numbers
    threads = torch.get_num_threads()
    if not dispatch.native.bias_grad_stats_cpu(
        *layout, read.scale, threads, grad.data_ptr(), to_sum, to_squares
    ):
        raise inputs.bad_offsets(len(read.dy))


def _cuda(read: GradOutput, grad: Tensor, *_: Tensor) -> None:
    assert dispatch.native is not None and read.numbers is not None
    *layout, to_sum, to_squares = read.numbers
    chunks, workspace = inputs.cuda_workspace(read)
    out = workspace.data_ptr(), grad.data_ptr(), to_sum, to_squares
    with torch.cuda.device(read.dy.device):
        stream = torch.cuda.current_stream().cuda_stream
        dispatch.native.bias_grad_stats_cuda(*layout, chunks, read.scale, *out, stream)


def _triton(read: GradOutput, grad: Tensor, total: Tensor, total_sq: Tensor) -> None:
    from beft_ext.ops.triton_bias_grad_stats import bias_grad_stats_triton

    chunks = inputs.chunk_count(*read.sizes())
    bias_grad_stats_triton(read.dy, read.offsets, chunks, read.scale, grad, total, total_sq)


_BACKENDS = {"reference": _reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}
