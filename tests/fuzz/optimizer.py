"""Rounds of BiasAdamW: what others do to parameters, gradients and defaults between its steps."""

from __future__ import annotations

import torch
from draw import FLOATS, Draw, Fault, Refused, attempt
from torch import Tensor
from twin import Twin

from beft_ext import BiasAdamW

SHAPES = [(7,), (1,), (0,), (2500,), (3, 33), (1025,), (2, 3, 5), ()]


def optimizer_round(draw: Draw) -> None:
    torch.set_default_dtype(draw.choice(FLOATS))
    params = [parameter(draw) for _ in range(draw.randint(1, 4))]
    twin = Twin(draw, params)
    optimizer = build(twin)
    for _ in range(draw.randint(1, 4)):
        torch.set_default_dtype(draw.choice(FLOATS))
        event = draw.choice(EVENTS) if draw.chance(0.4) else None
        early = draw.chance(0.5)
        if event and early:
            optimizer = event(draw, twin, optimizer) or optimizer
        for p in params:
            give_gradient(draw, p)
        if event and not early:
            optimizer = event(draw, twin, optimizer) or optimizer
        scale = draw.choice([None, None, 512.0])
        if scale is not None or hasattr(optimizer, "grad_scale"):
            optimizer.grad_scale = torch.tensor(scale or 1.0, dtype=torch.float32)
            optimizer.found_inf = torch.zeros((), dtype=torch.float32)
        before = [p.detach().clone() for p in params]
        try:
            attempt(optimizer.step)
        except Refused:
            if not all(torch.equal(a, p.detach()) for a, p in zip(before, params, strict=True)):
                raise Fault("a refused step moved a parameter") from None
            raise
        twin.follow(before)
        twin.step([p.grad for p in params], scale)
        twin.check(optimizer.grad_norm)
        scores = optimizer.scores()
        for i, grad in enumerate(twin.grads()):
            if grad is not None and grad.numel():
                twin.check_change(i, scores[str(i)].magnitude)


def build(twin: Twin) -> BiasAdamW:
    options = {**twin.options, "max_grad_norm": twin.max_grad_norm}
    optimizer = attempt(lambda: BiasAdamW(twin.params, **options))
    assert isinstance(optimizer, BiasAdamW)
    return optimizer


def parameter(draw: Draw) -> Tensor:
    dtype, shape = draw.choice(FLOATS), draw.choice(SHAPES)
    value = draw.fenced(draw.normal(*shape, dtype=dtype))
    if len(shape) == 2 and draw.chance(0.5):
        value = draw.fenced(draw.normal(shape[1], shape[0], dtype=dtype)).t()
    elif shape and draw.chance(0.2):
        value = draw.fenced(draw.normal(*shape[:-1], 2 * shape[-1], dtype=dtype))[..., ::2]
    return value.detach().requires_grad_()


def give_gradient(draw: Draw, p: Tensor) -> None:
    """A gradient that torch lets a parameter have, or none."""
    p.grad = None
    if draw.chance(0.1):
        return
    grad = draw.strided(*p.shape, dtype=p.dtype)
    kind = draw.choice(["negative", "imaginary", "sparse", "dtype", "size"])
    if draw.chance(0.7):
        kind = "plain"
    if kind == "negative":
        grad = torch._neg_view(grad)
    elif kind == "imaginary" and p.dtype in (torch.float32, torch.float64):
        grad = torch.complex(grad, grad).conj().imag
    elif kind == "sparse" and p.ndim:
        grad = grad.to_sparse()
    elif kind == "dtype" and hasattr(p, "grad_dtype"):
        p.grad_dtype = None
        grad = grad.to(draw.choice(FLOATS))
    elif kind == "size" and p.ndim:
        p.grad = grad
        p.grad.data = draw.fenced(draw.normal(p.numel() // 2, dtype=p.dtype))
        return
    p.grad = grad


def other_dtype(draw: Draw, twin: Twin, optimizer: BiasAdamW) -> None:
    """As model.to(dtype) does: each parameter, and its gradient with it."""
    dtype = draw.choice(FLOATS)
    for p in twin.params:
        grad, p.grad = p.grad, None
        p.data = draw.fenced(p.data.to(dtype))
        if grad is not None and draw.chance(0.5) and grad.shape == p.shape:
            p.grad = grad.to(dtype)


def other_data(draw: Draw, twin: Twin, optimizer: BiasAdamW) -> None:
    p = draw.choice(twin.params)
    n = p.numel()
    if draw.chance(0.3) and p.ndim:
        value = draw.fenced(draw.normal(*p.shape[:-1], 2 * p.shape[-1], dtype=p.dtype))[..., ::2]
    else:
        sizes = [(max(1, n // 2),), (2 * n + 1,), (0,), tuple(p.shape), tuple(p.shape)]
        dtype = draw.choice([p.dtype] * 3 + FLOATS)
        value = draw.fenced(draw.normal(*draw.choice(sizes), dtype=dtype))
    if draw.chance(0.2):
        value = torch._neg_view(value)
    if draw.chance(0.5):
        p.grad = None
    p.data = value


def written(draw: Draw, twin: Twin, optimizer: BiasAdamW) -> None:
    p = draw.choice(twin.params)
    with torch.no_grad():
        p.copy_(draw.normal(*p.shape)) if draw.chance(0.5) else p.data.mul_(-0.5)


def another_group(draw: Draw, twin: Twin, optimizer: BiasAdamW) -> None:
    p = parameter(draw)
    attempt(lambda: optimizer.add_param_group({"params": [p]}))
    twin.add(p)
    give_gradient(draw, p)


def reloaded(draw: Draw, twin: Twin, optimizer: BiasAdamW) -> BiasAdamW | None:
    same = [p.shape == leaf.shape for p, leaf in zip(twin.params, twin.leaves, strict=True)]
    if len(optimizer.param_groups) > 1 or not all(same) or not twin.steps:
        return None
    other = build(twin)
    attempt(lambda: other.load_state_dict(optimizer.state_dict()))
    return other


EVENTS = [other_dtype, other_data, other_data, written, another_group, reloaded]
