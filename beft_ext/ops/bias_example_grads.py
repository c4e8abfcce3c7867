"""``bias_example_grads``: each example's bias gradient, into the rows of a slab.

The first stage of ``bias_grad_stats``, and a second one that keeps the examples apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import TracingContext

from beft_ext.ops import checks, dispatch, grad_output as inputs, reference
from beft_ext.ops.checks import OperatorError
from beft_ext.ops.grad_output import GradOutput


def _run(grad_output: Tensor, example_offsets: Tensor | None, scale: float, out: Tensor) -> None:
    name, read = inputs.readable(
        "bias_example_grads_arguments", _check, grad_output, example_offsets, scale, out
    )
    _BACKENDS[name](read, out)


_op = torch.library.custom_op("beft_ext::bias_example_grads", _run, mutates_args=("out",))


@_op.register_fake
def _fake(grad_output: Tensor, example_offsets: Tensor | None, scale: float, out: Tensor) -> None:
    # Dynamo would bury the error in a page of its own: a compiled call is refused when it runs.
    if TracingContext.try_get() is None:
        _check(grad_output, example_offsets, out)


# torch's own handling of the negative bit ends in an internal assertion for what is mutated.
_LIBRARY = torch.library.Library("beft_ext", "FRAGMENT")
_LIBRARY.impl("bias_example_grads", torch.library.fallthrough_kernel, "Negative")


def bias_example_grads(
    grad_output: Tensor,
    out: Tensor,
    *,
    example_offsets: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """The bias gradient of each example, from one read.

    Writes ``scale * g_i`` into row ``i`` of ``out``, with ``g_i = sum_t grad_output[i, t]``, the
    gradient of example ``i``. An example without rows has the gradient zero. bf16 is rounded to
    nearest, ties to even, from the fp32 value. The result is the same to the bit on every run.

    Args:
        grad_output: gradient at the projection's output, fp32, bf16 or fp16, any strides. fp64
            runs on the reference backend.
        out: fp32 or bf16 (fp64 for fp64 input), overwritten. Its columns lie side by side, its
            rows may lie apart: a view into a slab. It must not share memory with grad_output.
        example_offsets: as of ``bias_grad_stats``.
        scale: the number that the loss was divided by (``B`` for a mean over examples).
    Shape:
        grad_output ``(B, T, H)``, or ``(N, H)`` beside example_offsets ``(B + 1,)``;
        out ``(B, H)``.
    Raises:
        OperatorError: (a ValueError) for shapes, dtypes, devices or offsets that do not fit.
        BackendError: where a forced backend does not read this device's memory.
    """
    if inputs.needs_dispatcher(grad_output, out):
        _op(grad_output, example_offsets, scale, out)
        return
    _run(grad_output, example_offsets, scale, out)
    # The kernels write through raw addresses; autograd must learn of it.
    torch.autograd.graph.increment_version(out)


def _check(dy: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    batch, width, dtype = inputs.check(dy, offsets)
    dtypes = (torch.float64,) if dtype is torch.float64 else (torch.float32, torch.bfloat16)
    if (
        out.dtype not in dtypes
        or out.shape != (batch, width)
        or out.device != dy.device
        or out.layout is not torch.strided
        or not _in_rows(out)
        or out.is_neg()
    ):
        kinds = " or ".join(map(str, dtypes))
        raise OperatorError(
            f"out must be a {kinds} tensor of shape {(batch, width)} on {dy.device}, each row in "
            f"one piece and apart from the others, but is {checks.described(out)}"
        )
    if checks.overlap(out, dy):
        raise OperatorError("out must not share memory with grad_output")


def _in_rows(out: Tensor) -> bool:
    """Whether columns lie side by side, and no two rows share an element."""
    if out.is_contiguous():
        return True
    (rows, width), (row, column) = out.shape, out.stride()
    return (width == 1 or column == 1) and (rows == 1 or row >= width)


def _reference(read: GradOutput, out: Tensor) -> None:
    inputs.check_values(read)
    reference.bias_example_grads(*read[:3], out)


def _cpu(read: GradOutput, _: Tensor) -> None:
    assert dispatch.native is not None and read.numbers is not None
    *layout, to, dtype, stride = read.numbers
    threads = torch.get_num_threads()
    if not dispatch.native.bias_example_grads_cpu(*layout, read.scale, threads, to, dtype, stride):
        raise inputs.bad_offsets(len(read.dy))


def _cuda(read: GradOutput, _: Tensor) -> None:
    assert dispatch.native is not None and read.numbers is not None
    *layout, to, dtype, stride = read.numbers
    chunks, workspace = inputs.cuda_workspace(read)
    out = workspace.data_ptr(), to, dtype, stride
    with torch.cuda.device(read.dy.device):
        stream = torch.cuda.current_stream().cuda_stream
        dispatch.native.bias_example_grads_cuda(*layout, chunks, read.scale, *out, stream)


def _triton(read: GradOutput, out: Tensor) -> None:
    from beft_ext.ops.triton_bias_grad_stats import bias_example_grads_triton

    chunks = inputs.chunk_count(*read.sizes())
    bias_example_grads_triton(read.dy, read.offsets, chunks, read.scale, out)


_BACKENDS = {"reference": _reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}
