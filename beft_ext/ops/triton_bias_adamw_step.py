"""One AdamW step over all biases in Triton: the same work as csrc/cuda/bias_adamw_step.cu.

Grid (blocks,): a program moves the elements of one entry of the table ``blocks`` and writes
their four sums to its own slot; finish_kernel, grid (segments,), adds each segment's slots in
order. With clipping a launch that only reads the gradients goes before. Deterministic: no
atomics. Addresses and sizes of parameters and gradients are read from a table on the device; a
block that reaches beyond them is brought inside. The table is copied there once. In the capture of
a CUDA graph, which holds no memory of the host, it is written by kernels whose arguments the
numbers are. Moves at least 5 reads and 3 writes of 4 bytes an element.
"""

import functools
from array import array

import torch
import triton
import triton.language as tl

from beft_ext.ops.bias_adamw_tables import BLOCK, AdamWTables, Located, packed_addresses
from beft_ext.ops.triton_bias_grad_stats import EXACT

SLOTS = 256  # slots that finish_kernel adds at a time


@triton.jit
def _load(address, at, dtype, inside):
    """Elements ``at`` of the fp32 (0), bf16 (1) or fp16 (2) tensor at ``address``, as fp32."""
    if dtype == 0:
        at_fp32 = address.to(tl.pointer_type(tl.float32)) + at
        x = tl.load(at_fp32, mask=inside, other=0.0)
    elif dtype == 1:
        at_bf16 = address.to(tl.pointer_type(tl.bfloat16)) + at
        x = tl.load(at_bf16, mask=inside, other=0.0).to(tl.float32)
    else:
        at_fp16 = address.to(tl.pointer_type(tl.float16)) + at
        x = tl.load(at_fp16, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _rounded(x, dtype):
    """fp32 ``x`` as a bf16 (1) or fp16 (2) tensor would hold it, as fp32."""
    if dtype == 1:
        rounded = x.to(tl.bfloat16, fp_downcast_rounding="rtne").to(tl.float32)
    else:
        rounded = x.to(tl.float16, fp_downcast_rounding="rtne").to(tl.float32)
    return rounded


@triton.jit
def _within(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _block(tensors, blocks, tensor_count, elements):
    """This program's block: its tensor's number, the addresses of parameter and gradient, dtype,
    three offsets and the length, brought inside of what they name."""
    entry = blocks + 6 * tl.program_id(0)
    index = _within(tl.load(entry), 0, tensor_count - 1)
    form = tensors + 2 * tensor_count + 4 * index
    param_size, grad_size = tl.load(form + 2), tl.load(form + 3)
    at_param = _within(tl.load(entry + 2), 0, param_size)
    at_grad = _within(tl.load(entry + 3), 0, grad_size)
    at_flat = _within(tl.load(entry + 4), 0, elements)
    room = tl.minimum(param_size - at_param, grad_size - at_grad)
    length = tl.minimum(tl.load(entry + 5), tl.minimum(room, elements - at_flat))
    param, grad = tl.load(tensors + index), tl.load(tensors + tensor_count + index)
    return index, param, grad, tl.load(form), at_param, at_grad, at_flat, length


@triton.jit
def _store(address, at, dtype, x, inside):
    if dtype == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + at, x, mask=inside)
    elif dtype == 1:
        tl.store(
            address.to(tl.pointer_type(tl.bfloat16)) + at,
            x.to(tl.bfloat16, fp_downcast_rounding="rtne"),
            mask=inside,
        )
    else:
        tl.store(
            address.to(tl.pointer_type(tl.float16)) + at,
            x.to(tl.float16, fp_downcast_rounding="rtne"),
            mask=inside,
        )


@triton.jit
def norm_kernel(
    tensors,  # (6 * tensors,) int64: addresses of the parameters, of the gradients (0: none), and
    #           of each tensor dtype, group, sizes of parameter and gradient
    blocks,  # (blocks, 6) int64: tensor, segment, three offsets, length
    unscale,  # (1,) fp32
    sums,  # (blocks, 4) fp32, column 3 written
    tensor_count,
    elements,
    BLOCK: tl.constexpr,
):
    _, _, grad, dtype, _, at_grad, _, length = _block(tensors, blocks, tensor_count, elements)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.where(grad != 0, length, 0)
    g = _load(grad, at_grad + lanes, dtype, inside) * tl.load(unscale)
    tl.store(sums + 4 * tl.program_id(0) + 3, tl.sum(g * g))


@triton.jit
def step_kernel(
    tensors,  # (6 * tensors,) int64, as above
    blocks,  # (blocks, 6) int64
    factors,  # (tensors, 8) fp32: AdamWFactors of csrc/bias_adamw_step.h
    unscale,  # (1,) fp32
    found_inf,  # (1,) fp32: not zero, nothing is written
    state,  # (3 or 4, elements) fp32
    sums,  # (blocks, 4) fp32, written
    tensor_count,
    elements,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf) != 0:
        return
    elements = tl.cast(elements, tl.int64)  # the state's rows lie far apart
    index, param, grad, dtype, at_param, at_grad, at_flat, length = _block(
        tensors, blocks, tensor_count, elements
    )
    if grad == 0:
        return
    lanes = tl.arange(0, BLOCK)
    inside = lanes < length
    at = at_param + lanes
    flat = state + at_flat + lanes
    f = factors + 8 * index
    raw = _load(grad, at_grad + lanes, dtype, inside)
    m = tl.load(flat, mask=inside, other=0.0)
    v = tl.load(flat + elements, mask=inside, other=0.0)
    initial = tl.load(flat + 2 * elements, mask=inside, other=0.0)
    b = _load(param, at, dtype, inside)
    if dtype != 0:
        # A parameter that is not its rounded master was written to by someone else: it counts.
        master = tl.load(flat + 3 * elements, mask=inside, other=0.0)
        b = tl.where(_rounded(master, dtype) == b, master, b)

    g = raw * tl.load(f)
    m += tl.load(f + 2) * (g - m)
    v = tl.load(f + 3) * v + tl.load(f + 4) * g * g
    b = tl.load(f + 1) * b - tl.load(f + 7) * (m / (tl.sqrt(v) * tl.load(f + 5) + tl.load(f + 6)))

    tl.store(flat, m, mask=inside)
    tl.store(flat + elements, v, mask=inside)
    if dtype != 0:
        tl.store(flat + 3 * elements, b, mask=inside)
    _store(param, at, dtype, b, inside)
    d = tl.where(inside, b - initial, 0.0)
    raw *= tl.load(unscale)
    slot = sums + 4 * tl.program_id(0)
    tl.store(slot, tl.sum(tl.abs(d)))
    tl.store(slot + 1, tl.sum(d * initial))
    tl.store(slot + 2, tl.sum(tl.where(inside, d * b, 0.0)))
    tl.store(slot + 3, tl.sum(raw * raw))


@triton.jit
def finish_kernel(
    tensors,  # (6 * tensors,) int64
    blocks,  # (blocks, 6) int64
    first_blocks,  # (segments + 1,) int64
    found_inf,  # (1,) fp32
    sums,  # (blocks, 4) fp32
    scores,  # (segments, 4) fp32, written for segments whose tensor has a gradient
    tensor_count,
    block_count,
    SLOTS: tl.constexpr,
):
    segment = tl.program_id(0)
    begin = _within(tl.load(first_blocks + segment), 0, block_count)
    end = _within(tl.load(first_blocks + segment + 1), 0, block_count)
    if tl.load(found_inf) != 0 or begin >= end:
        return
    index = _within(tl.load(blocks + 6 * begin), 0, tensor_count - 1)
    if tl.load(tensors + tensor_count + index) == 0:
        return
    lanes, columns = tl.arange(0, SLOTS), tl.arange(0, 4)
    total = tl.zeros((SLOTS, 4), tl.float32)
    for start in range(begin, end, SLOTS):
        rows = start + lanes
        at = sums + 4 * rows[:, None] + columns[None, :]
        total += tl.load(at, mask=(rows < end)[:, None], other=0.0)
    tl.store(scores + 4 * segment + columns, tl.sum(total, axis=0))


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on_device(numbers, dtype, device):
    """An array of numbers as a tensor of the device."""
    if _capturing(device):
        table = torch.zeros(len(numbers), dtype=dtype, device=device)
        torch._foreach_add_(list(table.unbind()), numbers.tolist())
        return table
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _copied(numbers.tobytes(), dtype, device, stream)


# Of one stream each: what is dropped here may be given to others while a kernel reads it, but not
# to those that come later on its own stream.
@functools.lru_cache(maxsize=16)
def _copied(packed, dtype, device, stream):
    return torch.frombuffer(bytearray(packed), dtype=dtype).to(device)


def _factors(t: AdamWTables, group_of, grad_factor):
    """(tensors, 8) fp32: the fields of AdamWFactors, made on the device in fp64."""
    table = _on_device(array("d", t.groups), torch.float64, t.steps.device).view(-1, 6)
    rate, beta1, beta2, eps, decay, sign = table[group_of].T
    if t.lr is not None:
        rate = t.lr.double()[group_of]
    step = t.steps.double()
    columns = [
        grad_factor.double() * sign,
        1 - rate * decay,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / (1 - beta2**step).sqrt(),
        eps,
        rate / (1 - beta1**step),
    ]
    return torch.stack(columns, 1).float()


def bias_adamw_step_triton(tables: AdamWTables):
    """Same contract as ``beft_ext.ops.bias_adamw_step``. Returns the norm, a scalar."""
    t, device = tables, tables.state.device
    assert isinstance(t.params, Located)
    words = array("q", t.params.addresses + packed_addresses(t.grads) + t.params.forms)
    tensors = _on_device(words, torch.int64, device)
    count, segments = len(t.blocks), len(t.first_blocks) - 1
    sizes = len(t.params), t.state.shape[1]
    has_grad = tensors[sizes[0] : 2 * sizes[0]] != 0
    group_of = tensors[2 * sizes[0] :].view(-1, 4)[:, 1]
    one, zero = (f(1, dtype=torch.float32, device=device) for f in (torch.ones, torch.zeros))
    unscale = one if t.grad_scale is None else 1 / t.grad_scale.reshape(1)
    infinite = zero if t.found_inf is None else t.found_inf.reshape(1)
    sums = t.workspace[: 4 * count].view(count, 4).zero_()
    norm = t.global_norm
    with torch.cuda.device_of(t.state):
        clip = one
        if t.max_grad_norm > 0:
            if norm is None:
                norm_kernel[(count,)](
                    tensors, t.blocks, unscale, sums, *sizes, BLOCK=BLOCK, num_warps=4, **EXACT
                )
                norm = sums[:, 3].sum().sqrt()
            clip = (t.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        t.steps.add_(has_grad * (infinite == 0))
        factors = _factors(t, group_of, clip * unscale)
        step_kernel[(count,)](
            tensors, t.blocks, factors, unscale, infinite, t.state, sums, *sizes,
            BLOCK=BLOCK, num_warps=4, **EXACT,
        )  # fmt: skip
        finish_kernel[(segments,)](
            tensors, t.blocks, t.first_blocks, infinite, sums, t.scores, sizes[0], count,
            SLOTS=SLOTS, num_warps=4, **EXACT,
        )  # fmt: skip
        return sums[:, 3].sum().sqrt().masked_fill_(infinite[0] != 0, torch.inf)
