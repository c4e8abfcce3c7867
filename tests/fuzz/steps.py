"""Rounds of ``bias_adamw_step`` as an operator, with tables that fit or do not."""

from __future__ import annotations

from typing import Any

import torch
from draw import FLOATS, Draw, Fault, Refused, attempt
from optimizer import SHAPES
from torch import Tensor
from twin import HALF, Twin

from beft_ext.ops.bias_adamw_tables import BLOCK

Tables = dict[str, Any]  # the operator's arguments, in its order


def step_round(draw: Draw) -> None:
    double = draw.chance(0.15)
    dtypes = [d for d in FLOATS if double or d != torch.float64]
    params = [
        draw.fenced(draw.normal(*draw.choice(SHAPES), dtype=draw.choice(dtypes)))
        for _ in range(draw.randint(1, 4))
    ]
    twin = Twin(draw, params)
    tables = tables_of(draw, twin, torch.float64 if double else torch.float32)
    call = torch.ops.beft_ext.bias_adamw_step
    if draw.chance(0.02):
        torch._dynamo.reset()
        backend = draw.choice(["aot_eager"] * 9 + ["inductor"])
        call = torch.compile(lambda *a: call_op(*a), fullgraph=True, backend=backend)
    for _ in range(draw.randint(1, 3)):
        tables["grads"] = [
            None if draw.chance(0.1) else draw.fenced(draw.normal(*p.shape, dtype=p.dtype))
            for p in params
        ]
        given = dict(tables, params=list(params), grads=list(tables["grads"]))
        if draw.chance(0.3):
            draw.choice(FAULTS)(draw, given)
        before = copies(given)
        try:
            compiled = call if plain(given) else torch.ops.beft_ext.bias_adamw_step
            norm = attempt(lambda arguments=given, run=compiled: run(*arguments.values()))
        except Refused:
            if not same(before, copies(given)):
                raise Fault("a refused call wrote to a tensor") from None
            raise
        tables, params = given, given["params"]
        twin.params = params
        scale = given["grad_scale"]
        twin.step(given["grads"], None if scale is None else float(scale))
        assert isinstance(norm, Tensor)
        twin.check(norm)
        for i, grad in enumerate(twin.grads()):
            if grad is not None and grad.numel():
                twin.check_change(i, float(given["scores"][i, 0]) / grad.numel())


def call_op(*arguments):  # type: ignore[no-untyped-def]
    return torch.ops.beft_ext.bias_adamw_step(*arguments)


def tables_of(draw: Draw, twin: Twin, dtype: torch.dtype) -> Tables:
    """One segment a parameter."""
    params, blocks, first, flat = twin.params, [], [0], 0
    for i, p in enumerate(params):
        for k in range(0, p.numel(), BLOCK):
            blocks.append([i, i, k, k, flat + k, min(BLOCK, p.numel() - k)])
        first.append(len(blocks))
        flat += p.numel()
    half = any(p.dtype in HALF for p in params)
    state = torch.zeros(4 if half else 3, flat, dtype=dtype)
    values = torch.cat([p.flatten().to(dtype) for p in params])
    state[2:] = values
    options = twin.options
    sign = -1.0 if options["maximize"] else 1.0
    made = {
        "params": params,
        "grads": [],
        "state": draw.fenced(state),
        "steps": draw.fenced(torch.zeros(len(params))),
        "scores": draw.fenced(torch.zeros(len(params), 4)),
        "blocks": draw.fenced(torch.tensor(blocks, dtype=torch.int64).view(-1, 6)),
        "first_blocks": draw.fenced(torch.tensor(first)),
        "group_of": [0] * len(params),
        "groups": [options["lr"], *options["betas"], 1e-8, options["weight_decay"], sign],
        "lr": draw.choice([None, torch.tensor([options["lr"]])]),
        "max_grad_norm": twin.max_grad_norm,
        "grad_scale": draw.choice([None, torch.tensor(512.0)]),
        "found_inf": draw.choice([None, torch.tensor(0.0)]),
        "workspace": draw.fenced(torch.zeros(4 * len(blocks) + len(params) + 1)),
    }
    return made


def plain(tables: Tables) -> bool:
    """Whether a compiler takes these; it refuses others in its own words."""
    tensors = [t for v in tables.values() for t in (v if isinstance(v, list) else [v])]
    return not any(isinstance(t, Tensor) and (t.is_sparse or t.is_neg()) for t in tensors)


def copies(tables: Tables) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for value in tables.values():
        for tensor in value if isinstance(value, list) else [value]:
            found.append(tensor.clone() if isinstance(tensor, Tensor) else None)
    return found


def same(before: list[Tensor | None], after: list[Tensor | None]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(
        a is None or torch.equal(a.to_dense(), b.to_dense()) for a, b in pairs if b is not None
    )


def other_buffer(draw: Draw, tables: Tables) -> None:
    names = ["state", "steps", "scores", "workspace", "blocks", "first_blocks"]
    names += [n for n in ("lr", "grad_scale", "found_inf") if tables[n] is not None]
    name = draw.choice(names)
    old = tables[name]
    kinds = {
        "dtype": lambda: old.to(draw.choice([*FLOATS, torch.int32, torch.int64])),
        "shorter": lambda: old[:-1] if old.ndim else old.expand(2),
        "narrower": lambda: old[..., :-1].contiguous() if old.ndim else old.expand(2),
        "longer": lambda: torch.cat([old, old[:1]]) if old.ndim else old.expand(2),
        "empty": lambda: old.new_zeros(0),
        "flat": lambda: old.flatten(),
        "strides": lambda: old.repeat_interleave(2, -1)[..., ::2] if old.ndim else old,
        "negative": lambda: torch._neg_view(old) if old.is_floating_point() else old.int(),
    }
    changed = kinds[draw.choice(list(kinds))]()
    tables[name] = draw.fenced(changed) if not changed.is_neg() else changed


def other_gradient(draw: Draw, tables: Tables) -> None:
    i = draw.randrange(len(tables["grads"]))
    p = tables["params"][i]
    kinds = {
        "shorter": lambda: draw.normal(p.numel() // 2, dtype=p.dtype),
        "dtype": lambda: draw.normal(*p.shape, dtype=draw.choice(FLOATS)),
        "strides": lambda: draw.normal(2 * p.numel(), dtype=p.dtype)[::2].view(p.shape),
        "integers": lambda: torch.ones(p.shape, dtype=torch.int32),
        "sparse": lambda: draw.normal(*p.shape, dtype=p.dtype).to_sparse(),
        "negative": lambda: torch._neg_view(draw.normal(*p.shape, dtype=p.dtype)),
    }
    tables["grads"][i] = kinds[draw.choice(list(kinds))]()
    if draw.chance(0.2):
        tables["grads"].append(None)


def other_parameter(draw: Draw, tables: Tables) -> None:
    i = draw.randrange(len(tables["params"]))
    p = tables["params"][i]
    if draw.chance(0.3):
        tables["params"].pop()
        return
    changed = draw.choice([p.flatten()[: p.numel() // 2], p.to(draw.choice(FLOATS)), p.int()])
    tables["params"][i] = draw.fenced(changed)


def other_entry(draw: Draw, tables: Tables) -> None:
    """A number in a table that names what is not there."""
    name = draw.choice(["blocks", "blocks", "first_blocks", "group_of", "groups", "max_grad_norm"])
    beyond = draw.choice([-1, 10**6, 2**40, -(2**40), 2**62])
    if name == "group_of":
        tables[name] = draw.choice([[beyond, *tables[name][1:]], tables[name][1:], []])
    elif name == "groups":
        tables[name] = tables[name][: draw.randint(0, 5)]
    elif name == "max_grad_norm":
        tables[name] = draw.choice([-1.0, float("nan"), float("inf")])
    elif tables[name].numel():
        changed = tables[name].flatten().clone()
        changed[draw.randrange(len(changed))] = beyond
        tables[name] = draw.fenced(changed.view(tables[name].shape))


FAULTS = [other_buffer, other_buffer, other_gradient, other_parameter, other_entry, other_entry]
