"""One AdamW step over all biases in Triton: the same work as csrc/cuda/bias_adamw_step.cu.

Grid (blocks,): a program moves the elements of one entry of the table ``blocks`` and writes
their four sums to its own slot; finish_kernel, grid (segments,), adds each segment's slots in
order. With clipping a launch that only reads the gradients goes before. Deterministic: no
atomics. Addresses of parameters and gradients are read from a table, copied to the device
before the step. Moves at least 5 reads and 3 writes of 4 bytes an element.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # elements of one entry of ``blocks`` at most
SLOTS = 256  # slots that finish_kernel adds at a time
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
    tensors,  # (tensors, 4) int64: addresses of parameter and gradient (0: none), dtype, group
    blocks,  # (blocks, 6) int64: tensor, segment, three offsets, length
    unscale,  # (1,) fp32
    sums,  # (blocks, 4) fp32, column 3 written
    BLOCK: tl.constexpr,
):
    entry = blocks + 6 * tl.program_id(0)
    tensor = tensors + 4 * tl.load(entry)
    grad = tl.load(tensor + 1)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.where(grad != 0, tl.load(entry + 5), 0)
    g = _load(grad, tl.load(entry + 3) + lanes, tl.load(tensor + 2), inside) * tl.load(unscale)
    tl.store(sums + 4 * tl.program_id(0) + 3, tl.sum(g * g))


@triton.jit
def step_kernel(
    tensors,  # (tensors, 4) int64, as above
    blocks,  # (blocks, 6) int64
    factors,  # (tensors, 8) fp32: AdamWFactors of csrc/bias_adamw_step.h
    unscale,  # (1,) fp32
    found_inf,  # (1,) fp32: not zero, nothing is written
    state,  # (3 or 4, elements) fp32
    sums,  # (blocks, 4) fp32, written
    elements,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf) != 0:
        return
    entry = blocks + 6 * tl.program_id(0)
    index = tl.load(entry)
    tensor = tensors + 4 * index
    param, grad, dtype = tl.load(tensor), tl.load(tensor + 1), tl.load(tensor + 2)
    if grad == 0:
        return
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.load(entry + 5)
    at = tl.load(entry + 2) + lanes
    flat = state + tl.load(entry + 4) + lanes
    f = factors + 8 * index
    raw = _load(grad, tl.load(entry + 3) + lanes, dtype, inside)
    m = tl.load(flat, mask=inside, other=0.0)
    v = tl.load(flat + elements, mask=inside, other=0.0)
    initial = tl.load(flat + 2 * elements, mask=inside, other=0.0)
    if dtype == 0:
        b = _load(param, at, 0, inside)
    else:
        b = tl.load(flat + 3 * elements, mask=inside, other=0.0)

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
    tl.store(slot + 2, tl.sum(d * d))
    tl.store(slot + 3, tl.sum(raw * raw))


@triton.jit
def finish_kernel(
    tensors,  # (tensors, 4) int64
    blocks,  # (blocks, 6) int64
    first_blocks,  # (segments + 1,) int64
    found_inf,  # (1,) fp32
    sums,  # (blocks, 4) fp32
    scores,  # (segments, 4) fp32, written for segments whose tensor has a gradient
    SLOTS: tl.constexpr,
):
    segment = tl.program_id(0)
    begin, end = tl.load(first_blocks + segment), tl.load(first_blocks + segment + 1)
    if tl.load(found_inf) != 0:
        return
    if tl.load(tensors + 4 * tl.load(blocks + 6 * begin) + 1) == 0:
        return
    lanes, columns = tl.arange(0, SLOTS), tl.arange(0, 4)
    total = tl.zeros((SLOTS, 4), tl.float32)
    for start in range(begin, end, SLOTS):
        rows = start + lanes
        at = sums + 4 * rows[:, None] + columns[None, :]
        total += tl.load(at, mask=(rows < end)[:, None], other=0.0)
    tl.store(scores + 4 * segment + columns, tl.sum(total, axis=0))


def _factors(groups, lr, group_of, steps, grad_factor):
    """(tensors, 8) fp32: the fields of AdamWFactors, made on the device in fp64."""
    table = torch.tensor(groups, dtype=torch.float64).view(-1, 6).to(steps.device)
    if lr is not None:
        table[:, 0] = lr
    rate, beta1, beta2, eps, decay, sign = table[torch.tensor(group_of, device=steps.device)].T
    step = steps.double()
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


def bias_adamw_triton(
    params, grads, state, steps, scores, blocks, first_blocks, group_of, groups, lr,
    max_norm, grad_scale, found_inf, workspace,
):  # fmt: skip
    """Same contract as ``beft_ext.ops.bias_adamw_step``. Returns the global norm, a scalar."""
    device = state.device
    rows = [
        (p.data_ptr(), 0 if g is None else g.data_ptr(), CODES[p.dtype], i)
        for p, g, i in zip(params, grads, group_of, strict=True)
    ]
    tensors = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    one = torch.ones(1, device=device)
    unscale = one if grad_scale is None else 1 / grad_scale.reshape(1).float()
    infinite = torch.zeros(1, device=device) if found_inf is None else found_inf.reshape(1).float()
    count, segments = len(blocks), len(first_blocks) - 1
    sums = workspace[: 4 * count].view(count, 4).zero_()
    with torch.cuda.device_of(state):
        clip = one
        if max_norm > 0:
            norm_kernel[(count,)](tensors, blocks, unscale, sums, BLOCK=BLOCK, num_warps=4)
            norm = sums[:, 3].sum().sqrt()
            clip = (max_norm / (norm + 1e-6)).clamp(max=1)
        steps += (tensors[:, 1] != 0) * (infinite == 0)
        factors = _factors(groups, lr, group_of, steps, clip * unscale)
        step_kernel[(count,)](
            tensors, blocks, factors, unscale, infinite, state, sums, state.shape[1],
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        finish_kernel[(segments,)](
            tensors, blocks, first_blocks, infinite, sums, scores, SLOTS=SLOTS, num_warps=4
        )
    return norm if max_norm > 0 else sums[:, 3].sum().sqrt()
