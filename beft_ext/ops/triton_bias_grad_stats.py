"""Bias-gradient statistics in Triton: the same two stages as csrc/cuda/bias_grad_stats.cu.

Per-example bias gradients g_i[h] = sum_t dY[i,t,h] in fp32. bias_grad_stats makes of them grad =
sum_i g_i, and in place sum += scale * grad, sum_sq += sum_i (scale * g_i)^2; bias_example_grads
the rows scale * g_i.

Stage 1, grid (strips * B, chunks): a program reads one chunk of rows of one example over
BLOCK_H columns and writes BLOCK_H sums and their errors. Stage 2, grid (ceil(H / COLUMNS),) for
the statistics and (ceil(H / COLUMNS) * ceil(B / GROUPS),) for the rows: a program reads those for
COLUMNS columns, GROUPS examples at a time, chunks in order, and writes the results.
Deterministic: no atomics; row t goes to slot t mod BLOCK_T of a program, GROUPS runs of examples
add one by one, and slots and runs merge as a binary tree; the caller's number of chunks follows
from (B, T, H) alone.
Moves at least B*T*H*itemsize bytes and 20*H, or the rows, plus 16*B*chunks*H for the partial sums.
"""

import torch
import triton
import triton.language as tl

BLOCK_T = 32
MAX_BLOCK_H = 128
GROUPS, COLUMNS = 8, 32  # of stage 2


@triton.jit
def _two_sum(total, error, x):
    """Knuth's TwoSum: total + error grows by x, the rounding error kept in ``error``."""
    new = total + x
    taken = new - total
    return new, error + ((total - (new - taken)) + (x - taken))


@triton.jit
def _value(total, error):
    """total + error; after an overflow ``error`` is NaN while ``total`` says what happened."""
    return tl.where(error == error, total + error, total)


@triton.jit
def _halves(x, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    """The first and the second HALF rows of x, (2 * HALF, BLOCK_H)."""
    return tl.split(tl.permute(tl.reshape(x, (2, HALF, BLOCK_H)), (1, 2, 0)))


@triton.jit
def _merge_rows(total, error, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Merges (ROWS, BLOCK_H) compensated sums to (1, BLOCK_H) as a binary tree."""
    if ROWS == 1:
        return total, error
    else:
        HALF: tl.constexpr = ROWS // 2
        total_a, total_b = _halves(total, HALF, BLOCK_H)
        error_a, error_b = _halves(error, HALF, BLOCK_H)
        merged, lost = _two_sum(total_a, error_a, total_b)
        return _merge_rows(merged, lost + error_b, HALF, BLOCK_H)


@triton.jit
def partial_sums_kernel(
    grad_output,  # (B, T, H) or (N, H), strided
    example_offsets,  # (B + 1,) int64, or None
    sums,  # (B, chunks, H) fp32, written
    errors,  # (B, chunks, H) fp32, written
    tokens,
    width,
    stride_b,
    stride_t,
    stride_h,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    strips = tl.cdiv(width, BLOCK_H)
    example = (tl.program_id(0) // strips).to(tl.int64)
    strip = tl.program_id(0) % strips
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    columns = strip * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < width

    if example_offsets is None:
        base = grad_output + example * stride_b
        first = example * 0
        last = first + tokens
    else:
        base = grad_output
        # The host does not wait to read the offsets, so wrong ones are clamped, not refused.
        first = tl.minimum(tl.maximum(tl.load(example_offsets + example), 0), tokens)
        last = tl.minimum(tl.maximum(tl.load(example_offsets + example + 1), 0), tokens)
    length = (last - first + chunks - 1) // chunks
    begin = tl.minimum(first + chunk * length, last)
    end = tl.minimum(begin + length, last)

    column_offsets = columns.to(tl.int64) * stride_h
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    error = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (rows < end)[:, None] & inside[None, :]
        at = base + rows[:, None] * stride_t + column_offsets[None, :]
        total, error = _two_sum(total, error, tl.load(at, mask=mask, other=0.0).to(tl.float32))

    total, error = _merge_rows(total, error, BLOCK_T, BLOCK_H)
    out = (example * chunks + chunk) * width + columns
    tl.store(sums + out, tl.reshape(total, (BLOCK_H,)), mask=inside)
    tl.store(errors + out, tl.reshape(error, (BLOCK_H,)), mask=inside)


@triton.jit
def _merged_chunks(
    sums, errors, chunks, width, inside, GROUPS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Compensated sums of GROUPS examples at COLUMNS columns, and where the next examples begin."""
    total = tl.zeros((GROUPS, COLUMNS), tl.float32)
    error = tl.zeros((GROUPS, COLUMNS), tl.float32)
    for _ in range(0, chunks):
        total, error = _two_sum(total, error, tl.load(sums, mask=inside, other=0.0))
        error += tl.load(errors, mask=inside, other=0.0)
        sums += width
        errors += width
    return total, error, sums, errors


@triton.jit
def finish_columns_kernel(
    sums,  # (B, chunks, H) fp32
    errors,  # (B, chunks, H) fp32
    grad,  # (H,) fp32, written
    sum_out,  # (H,) fp32, added to
    sum_sq_out,  # (H,) fp32, added to
    scale,
    batch,
    chunks,
    width,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    run = tl.cdiv(batch, GROUPS)  # of examples that one group adds
    examples = tl.arange(0, GROUPS).to(tl.int64) * run
    at = (examples * chunks * width)[:, None] + columns[None, :]
    sums += at
    errors += at
    grad_total = tl.zeros((GROUPS, COLUMNS), tl.float32)
    grad_error = tl.zeros((GROUPS, COLUMNS), tl.float32)
    squares = tl.zeros((GROUPS, COLUMNS), tl.float32)
    squares_error = tl.zeros((GROUPS, COLUMNS), tl.float32)
    for i in range(0, run):
        inside = (examples + i < batch)[:, None] & (columns < width)[None, :]
        total, error, sums, errors = _merged_chunks(
            sums, errors, chunks, width, inside, GROUPS, COLUMNS
        )
        scaled = tl.where(inside, scale * _value(total, error), 0.0)
        squares, squares_error = _two_sum(squares, squares_error, scaled * scaled)
        grad_total, grad_error = _two_sum(grad_total, grad_error, total)
        grad_error += error

    grad_total, grad_error = _merge_rows(grad_total, grad_error, GROUPS, COLUMNS)
    squares, squares_error = _merge_rows(squares, squares_error, GROUPS, COLUMNS)
    result = tl.reshape(_value(grad_total, grad_error), (COLUMNS,))
    square = tl.reshape(_value(squares, squares_error), (COLUMNS,))
    inside = columns < width
    tl.store(grad + columns, result, mask=inside)
    before = tl.load(sum_out + columns, mask=inside)
    tl.store(sum_out + columns, before + scale * result, mask=inside)
    before = tl.load(sum_sq_out + columns, mask=inside)
    tl.store(sum_sq_out + columns, before + square, mask=inside)


@triton.jit
def finish_rows_kernel(
    sums,  # (B, chunks, H) fp32
    errors,  # (B, chunks, H) fp32
    out,  # (B, H) fp32 or bf16, rows `stride` elements apart, written
    stride,
    scale,
    batch,
    chunks,
    width,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    strips = tl.cdiv(width, COLUMNS)
    group = (tl.program_id(0) // strips).to(tl.int64)
    examples = group * GROUPS + tl.arange(0, GROUPS)
    columns = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    inside = (examples < batch)[:, None] & (columns < width)[None, :]
    at = (examples * chunks * width)[:, None] + columns[None, :]
    total, error, _, _ = _merged_chunks(
        sums + at, errors + at, chunks, width, inside, GROUPS, COLUMNS
    )
    scaled = scale * _value(total, error)
    to = out + (examples * stride)[:, None] + columns[None, :]
    tl.store(to, scaled.to(out.dtype.element_ty), mask=inside)


# No product is contracted into an addition: TwoSum's errors are the exact ones, and numbers do not
# depend on what a version of Triton does by itself.
EXACT = {"enable_fp_fusion": False}


def _partial_sums(
    grad_output: torch.Tensor, example_offsets: torch.Tensor | None, chunks: int
) -> torch.Tensor:
    """Stage 1: sums and errors, ``(2, B, chunks, H)``. H is not 0."""
    width = grad_output.shape[-1]
    if example_offsets is None:
        batch, tokens, _ = grad_output.shape
        stride_b, stride_t, stride_h = grad_output.stride()
    else:
        batch, tokens = example_offsets.numel() - 1, grad_output.shape[0]
        stride_b, (stride_t, stride_h) = 0, grad_output.stride()
    block_h = min(MAX_BLOCK_H, max(16, triton.next_power_of_2(width)))
    partial = torch.empty((2, batch, chunks, width), dtype=torch.float32, device=grad_output.device)
    if batch > 0:
        partial_sums_kernel[(triton.cdiv(width, block_h) * batch, chunks)](
            grad_output, example_offsets, *partial, tokens, width, stride_b, stride_t, stride_h,
            BLOCK_T=BLOCK_T, BLOCK_H=block_h, num_warps=8, **EXACT,
        )  # fmt: skip
    return partial


def bias_grad_stats_triton(
    grad_output: torch.Tensor,
    example_offsets: torch.Tensor | None,
    chunks: int,
    scale: float,
    grad: torch.Tensor,
    sum: torch.Tensor,
    sum_sq: torch.Tensor,
) -> None:
    """Writes ``grad`` and adds to ``sum`` and ``sum_sq``, in place.

    grad_output: ``(B, T, H)``, or ``(N, H)`` with example_offsets ``(B + 1,)`` int64; fp32,
    bf16 or fp16, any strides. chunks: into how many each example is cut. grad, sum, sum_sq:
    ``(H,)`` fp32, contiguous.
    """
    width = grad_output.shape[-1]
    if width == 0:
        return
    with torch.cuda.device_of(grad_output):
        partial = _partial_sums(grad_output, example_offsets, chunks)
        finish_columns_kernel[(triton.cdiv(width, COLUMNS),)](
            *partial, grad, sum, sum_sq, scale, partial.shape[1], chunks, width,
            GROUPS=GROUPS, COLUMNS=COLUMNS, num_warps=8, **EXACT,
        )  # fmt: skip


def bias_example_grads_triton(
    grad_output: torch.Tensor,
    example_offsets: torch.Tensor | None,
    chunks: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Writes ``out``, ``(B, H)`` fp32 or bf16 with its columns side by side; the rest as above."""
    if out.numel() == 0:
        return
    batch, width = out.shape
    with torch.cuda.device_of(grad_output):
        partial = _partial_sums(grad_output, example_offsets, chunks)
        grid = triton.cdiv(width, COLUMNS) * triton.cdiv(batch, GROUPS)
        finish_rows_kernel[(grid,)](
            *partial, out, out.stride(0), scale, batch, chunks, width,
            GROUPS=GROUPS, COLUMNS=COLUMNS, num_warps=8, **EXACT,
        )  # fmt: skip
