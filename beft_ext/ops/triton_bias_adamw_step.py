"""One AdamW step over all biases in Triton: the same work as csrc/cuda/bias_adamw_step.cu.

Grid (blocks,): a program moves the elements of one entry of the table ``blocks`` and writes
their four sums to its own slot; finish_kernel, grid (segments,), adds each segment's slots in
order. With clipping a launch that only reads the gradients goes before. Deterministic: no
atomics. Addresses and sizes of parameters and gradients are read from a table, copied to the
device before the step; a block that reaches beyond them is brought inside. Moves at least 5
reads and 3 writes of 4 bytes an element.
"""

import torch
import triton
import triton.language as tl

from beft_ext.ops.bias_adamw_tables import BLOCK, AdamWTables, Located

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
    """This program's block: its tensor's number and entry, three offsets and the length, brought
    inside of what they name."""
    entry = blocks + 6 * tl.program_id(0)
    index = _within(tl.load(entry), 0, tensor_count - 1)
    tensor = tensors + 6 * index
    param_size, grad_size = tl.load(tensor + 4), tl.load(tensor + 5)
    at_param = _within(tl.load(entry + 2), 0, param_size)
    at_grad = _within(tl.load(entry + 3), 0, grad_size)
    at_flat = _within(tl.load(entry + 4), 0, elements)
    room = tl.minimum(param_size - at_param, grad_size - at_grad)
    length = tl.minimum(tl.load(entry + 5), tl.minimum(room, elements - at_flat))
    return index, tensor, at_param, at_grad, at_flat, length


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
    tensors,  # (tensors, 6) int64: addresses of parameter and gradient (0: none), dtype, group,
    #           sizes of parameter and gradient
    blocks,  # (blocks, 6) int64: tensor, segment, three offsets, length
    unscale,  # (1,) fp32
    sums,  # (blocks, 4) fp32, column 3 written
    tensor_count,
    elements,
    BLOCK: tl.constexpr,
):
    _, tensor, _, at_grad, _, length = _block(tensors, blocks, tensor_count, elements)
    grad = tl.load(tensor + 1)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.where(grad != 0, length, 0)
    g = _load(grad, at_grad + lanes, tl.load(tensor + 2), inside) * tl.load(unscale)
    tl.store(sums + 4 * tl.program_id(0) + 3, tl.sum(g * g))


@triton.jit
def step_kernel(
    tensors,  # (tensors, 6) int64, as above
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
    index, tensor, at_param, at_grad, at_flat, length = _block(
        tensors, blocks, tensor_count, elements
    )
    param, grad, dtype = tl.load(tensor), tl.load(tensor + 1), tl.load(tensor + 2)
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
    tensors,  # (tensors, 6) int64
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
    tensor = tensors + 6 * _within(tl.load(blocks + 6 * begin), 0, tensor_count - 1)
    if tl.load(tensor + 1) == 0:
        return
    lanes, columns = tl.arange(0, SLOTS), tl.arange(0, 4)
    total = tl.zeros((SLOTS, 4), tl.float32)
    for start in range(begin, end, SLOTS):
        rows = start + lanes
        at = sums + 4 * rows[:, None] + columns[None, :]
        total += tl.load(at, mask=(rows < end)[:, None], other=0.0)
    tl.store(scores + 4 * segment + columns, tl.sum(total, axis=0))


def _factors(t: AdamWTables, grad_factor):
    """(tensors, 8) fp32: the fields of AdamWFactors, made on the device in fp64."""
    table = torch.tensor(t.groups, dtype=torch.float64, device=t.steps.device).view(-1, 6)
    if t.lr is not None:
        table[:, 0] = t.lr
    rate, beta1, beta2, eps, decay, sign = table[torch.tensor(t.group_of, device=t.steps.device)].T
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


def _words(packed):
    return torch.frombuffer(bytearray(packed), dtype=torch.int64)


def bias_adamw_step_triton(tables: AdamWTables):
    """Same contract as ``beft_ext.ops.bias_adamw_step``. Returns the norm, a scalar."""
    t, device = tables, tables.state.device
    assert isinstance(t.params, Located)
    grads = [0 if g is None else g.data_ptr() for g in t.grads]
    rows = torch.cat(
        [
            _words(t.params.addresses)[:, None],
            torch.tensor(grads, dtype=torch.int64, device="cpu")[:, None],
            _words(t.params.forms).view(-1, 4),
        ],
        1,
    )
    tensors = rows.to(device, non_blocking=True)
    one, zero = (f(1, dtype=torch.float32, device=device) for f in (torch.ones, torch.zeros))
    unscale = one if t.grad_scale is None else 1 / t.grad_scale.reshape(1)
    infinite = zero if t.found_inf is None else t.found_inf.reshape(1)
    count, segments = len(t.blocks), len(t.first_blocks) - 1
    sizes = len(t.params), t.state.shape[1]
    sums = t.workspace[: 4 * count].view(count, 4).zero_()
    norm = t.global_norm
    with torch.cuda.device_of(t.state):
        clip = one
        if t.max_grad_norm > 0:
            if norm is None:
                norm_kernel[(count,)](
                    tensors, t.blocks, unscale, sums, *sizes, BLOCK=BLOCK, num_warps=4
                )
                norm = sums[:, 3].sum().sqrt()
            clip = (t.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        t.steps.add_((tensors[:, 1] != 0) * (infinite == 0))
        factors = _factors(t, clip * unscale)
        step_kernel[(count,)](
            tensors, t.blocks, factors, unscale, infinite, t.state, sums, *sizes,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        finish_kernel[(segments,)](
            tensors, t.blocks, t.first_blocks, infinite, sums, t.scores, sizes[0], count,
            SLOTS=SLOTS, num_warps=4,
        )  # fmt: skip
    return torch.where(infinite[0] == 0, sums[:, 3].sum().sqrt(), torch.inf)
