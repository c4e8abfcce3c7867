"""Rounds of ``bias_grad_stats`` and ``bias_example_grads``: by function, as operators, compiled."""

from __future__ import annotations

import itertools

import torch
from draw import EPS, FLOATS, Draw, Fault, Refused, attempt

from beft_ext.ops import bias_example_grads, bias_grad_stats


def inputs(draw: Draw):  # type: ignore[no-untyped-def]
    """grad_output, offsets or None, and how many examples that is."""
    packed, dtype = draw.chance(0.5), draw.choice(FLOATS)
    width = draw.choice([0, 1, 3, 16, 33, 64, 130, 300])
    batch, tokens = draw.randint(0, 5), draw.choice([0, 1, 7, 8, 64, 129, 300])
    rows = batch * tokens
    dy = draw.strided(*((rows, width) if packed else (batch, tokens, width)), dtype=dtype)
    if not packed:
        return dy, None, batch
    edges = sorted(draw.randint(0, rows) for _ in range(batch + 1))
    return dy, draw.fenced(torch.tensor(edges)), batch


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a compiler takes it to write to; it refuses others in its own words."""
    odd = tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()
    if tensor.layout is not torch.strided or odd:
        return False
    return all(step or size < 2 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def one_of(draw: Draw, eager, operator, plain):  # type: ignore[no-untyped-def]
    """The operator's function, the operator, or, where all tensors are plain, it compiled."""
    if plain and draw.chance(0.02):
        torch._dynamo.reset()
        backend = draw.choice(["aot_eager"] * 9 + ["inductor"])
        return torch.compile(eager, fullgraph=True, backend=backend, dynamic=True)
    return draw.choice([eager] * 6 + [operator] * 3)


def stats_round(draw: Draw) -> None:
    dy, offsets, _ = inputs(draw)
    dtype, width = dy.dtype, dy.shape[-1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    buffers = [draw.fenced(draw.normal(width, dtype=wide)) for _ in range(2)]
    if draw.chance(0.4):
        dy, offsets, buffers = draw.choice(STATS_FAULTS)(draw, dy, offsets, buffers)
    scale = draw.choice([1.0, 16.0, 0.3])
    plain = all(map(is_plain, (dy, *buffers)))
    call = one_of(draw, eager_stats, torch.ops.beft_ext.bias_grad_stats, plain)
    before = [b.double().clone() for b in buffers]
    try:
        grad = attempt(lambda: call(dy, offsets, scale, *buffers))
    except Refused:
        if not all(torch.equal(b.double(), a) for b, a in zip(buffers, before, strict=True)):
            raise Fault("a refused call wrote to a buffer") from None
        raise
    check_stats(dy, offsets, scale, before, [grad, *buffers])


def eager_stats(dy, offsets, scale, *buffers):  # type: ignore[no-untyped-def]
    return bias_grad_stats(dy, *buffers, example_offsets=offsets, scale=scale)


def sums(dy, offsets):  # type: ignore[no-untyped-def]
    """float64 sums of each example, of its absolute values, and the longest example's rows."""
    bounds = []
    if offsets is None and dy.numel():
        bounds = [(i * dy.shape[1], (i + 1) * dy.shape[1]) for i in range(len(dy))]
    elif offsets is None and dy.shape[1] == 0 and len(dy) < 2**20:
        bounds = [(0, 0)] * len(dy)
    if offsets is not None:
        edges = offsets.tolist()
        if edges != sorted(edges) or not edges or edges[0] < 0 or edges[-1] > len(dy):
            raise Fault(f"offsets {edges} were taken for {len(dy)} rows")
        bounds = list(itertools.pairwise(edges))
    width = dy.shape[-1]
    rows = dy.double().reshape(-1, width) if dy.numel() else dy.new_zeros(0, width).double()
    g = torch.zeros(len(bounds), width, dtype=torch.float64)
    size = g.clone()
    for i, (a, b) in enumerate(bounds):
        g[i], size[i] = rows[a:b].sum(0), rows[a:b].abs().sum(0)
    return g, size, max((b - a for a, b in bounds), default=0)


def check_stats(dy, offsets, scale, before, found):  # type: ignore[no-untyped-def]
    """Against loops over float64; raises Fault."""
    if not dy.is_floating_point():
        raise Fault(f"a gradient of {dy.dtype} was taken")
    g, size, longest = sums(dy, offsets)
    wants = g.sum(0), before[0] + scale * g.sum(0), before[1] + (scale * g).square().sum(0)
    # A plain sum of n terms errs by at most n roundings of the sum of absolute values.
    bound = (longest + len(g) + 4) * EPS
    sizes = size.sum(0), scale * size.sum(0) + before[0].abs(), (scale * size).square().sum(0) * 3
    sizes = (*sizes[:2], sizes[2] + before[1].abs())
    for name, want, have, extent in zip(
        ("grad", "sum", "squares"), wants, found, sizes, strict=True
    ):
        if have.shape != want.shape:
            raise Fault(f"{name} has shape {tuple(have.shape)}, not {tuple(want.shape)}")
        if not bool(((have.double() - want).abs() <= bound * extent + 1e-37).all()):
            raise Fault(f"{name} is wrong by {(have.double() - want).abs().max():.3g}")


def rows_round(draw: Draw) -> None:
    dy, offsets, batch = inputs(draw)
    width = dy.shape[-1]
    double = dy.dtype == torch.float64
    dtype = torch.float64 if double else draw.choice([torch.float32, torch.bfloat16])
    slab = draw.fenced(draw.normal(batch, width + draw.randint(0, 9), dtype=dtype))
    at = draw.randint(0, slab.shape[1] - width)
    out = slab[:, at : at + width]
    if draw.chance(0.4):
        fault = draw.choice([other_rows, other_rows, other_grad, other_offsets])
        dy, offsets, out = fault(draw, dy, offsets, out)
    scale = draw.choice([1.0, 16.0, 0.3])
    plain = all(map(is_plain, (dy, out)))
    call = one_of(draw, eager_rows, torch.ops.beft_ext.bias_example_grads, plain)
    before, beside = out.clone(), slab.clone()
    try:
        attempt(lambda: call(dy, offsets, scale, out))
    except Refused:
        if not torch.equal(before.to_dense(), out.to_dense()):
            raise Fault("a refused call wrote to a row") from None
        raise
    if not dy.is_floating_point():
        raise Fault(f"a gradient of {dy.dtype} was taken")
    g, size, longest = sums(dy, offsets)
    if out.numel() and out.shape != g.shape:
        raise Fault(f"rows of shape {tuple(out.shape)} were taken, not {tuple(g.shape)}")
    bound = (longest + 2) * EPS * scale * size
    if out.dtype == torch.bfloat16:  # half of its last place, of what was computed
        bound = bound + 2.0**-8 * (scale * g.abs() + bound)
    if out.numel() and not bool(((out.double() - scale * g).abs() <= bound + 1e-37).all()):
        raise Fault(f"a row is wrong by {(out.double() - scale * g).abs().max():.3g}")
    slab[:, at : at + width] = beside[:, at : at + width]
    if not torch.equal(slab, beside):
        raise Fault("a column beside the rows was written")


def eager_rows(dy, offsets, scale, out):  # type: ignore[no-untyped-def]
    bias_example_grads(dy, out, example_offsets=offsets, scale=scale)


def other_rows(draw, dy, offsets, out):  # type: ignore[no-untyped-def]
    batch, width = out.shape
    kinds = {
        "shape": lambda: draw.fenced(draw.normal(batch + draw.randint(-1, 1) % 3, width + 1)),
        "dtype": lambda: draw.fenced(draw.normal(batch, width, dtype=draw.choice(FLOATS))),
        "integers": lambda: torch.zeros(batch, width, dtype=torch.int32),
        "columns": lambda: draw.fenced(draw.normal(batch, 2 * width))[:, ::2],
        "transposed": lambda: draw.fenced(draw.normal(width, batch)).T,
        "expanded": lambda: draw.fenced(draw.normal(width)).expand(batch, width),
        "negative": lambda: torch._neg_view(draw.fenced(draw.normal(batch, width))),
        "flat": lambda: draw.fenced(draw.normal(batch * width)),
        "its own input": lambda: dy[:, 0] if dy.ndim == 3 and dy.shape[1] else dy,
    }
    return dy, offsets, kinds[draw.choice(list(kinds))]()


def other_buffer(draw, dy, offsets, buffers):  # type: ignore[no-untyped-def]
    width, at = dy.shape[-1], draw.randint(0, 1)
    kinds = {
        "shape": lambda: draw.fenced(draw.normal(draw.choice([width + 1, width // 2, 1, 0]))),
        "dtype": lambda: draw.fenced(draw.normal(width, dtype=draw.choice(FLOATS))),
        "integers": lambda: torch.zeros(width, dtype=torch.int32),
        "strides": lambda: draw.fenced(draw.normal(2 * width))[::2],
        "negative": lambda: torch._neg_view(draw.fenced(draw.normal(width))),
        "two axes": lambda: draw.fenced(draw.normal(1, width)),
        "twice": lambda: buffers[1 - at],
    }
    buffers[at] = kinds[draw.choice(list(kinds))]()
    return dy, offsets, buffers


def overlapping(draw, dy, offsets, buffers):  # type: ignore[no-untyped-def]
    width = dy.shape[-1]
    both = draw.fenced(draw.normal(2 * width))
    return dy, offsets, [both[:width], both[width // 2 : width // 2 + width]]


def other_grad(draw, dy, offsets, buffers):  # type: ignore[no-untyped-def]
    kinds = {
        "negative": lambda: torch._neg_view(dy),
        "imaginary": lambda: torch.complex(dy.float(), dy.float()).conj().imag.to(dy.dtype),
        "conjugate": lambda: dy.to(torch.complex64).conj(),
        "integers": lambda: dy.int(),
        "sparse": lambda: dy.to_sparse(),
        "fewer axes": lambda: dy[0] if len(dy) else dy.new_zeros(3),
        "freed": lambda: torch._efficientzerotensor(dy.shape, dtype=dy.dtype),
        "huge and empty": lambda: dy.new_zeros(()).float().expand(2**40, 0, dy.shape[-1]),
    }
    return kinds[draw.choice(list(kinds))](), offsets, buffers


def other_offsets(draw, dy, offsets, buffers):  # type: ignore[no-untyped-def]
    if offsets is None:
        return dy, torch.tensor([0, len(dy)]), buffers
    at = draw.randrange(len(offsets))
    wrong = draw.choice([-1, len(dy) + 1, 2**40, -(2**40), 2**62, draw.randint(0, len(dy) + 9)])
    changed = offsets.index_fill(0, torch.tensor(at), wrong)
    kinds = [changed] * 4 + [offsets.int(), offsets.flip(0), offsets[:0], offsets.float()]
    kinds += [offsets.repeat_interleave(2)[::2], offsets.unsqueeze(0)]
    return dy, draw.choice(kinds), buffers


STATS_FAULTS = [other_buffer, other_buffer, overlapping, other_grad, other_offsets, other_offsets]
