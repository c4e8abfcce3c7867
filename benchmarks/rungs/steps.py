"""The ladder of ``bias_adamw_step``: one AdamW step over all biases, with the sums of their scores.

Each rung takes the parameters, whose gradients are there, and gives the function that does one
step and returns ``(len(params), 4)``: what ``score_sums`` says of each. In the order in which
docs/kernels.md climbs them; the last rung is the product's own, ``BiasAdamW``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beft_ext.ops.reference import adamw, score_sums

Step = Callable[[], Tensor]
BETAS, EPS = (0.9, 0.999), 1e-8


def formula(params: list[Tensor], lr: float) -> Step:
    """The formula as it is printed, parameter by parameter, and the scores likewise."""
    initial = [p.detach().clone() for p in params]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    count = 0

    @torch.no_grad()
    def step() -> Tensor:
        nonlocal count
        count += 1
        sums = []
        for i, p in enumerate(params):
            assert p.grad is not None
            theta, *moments[i] = adamw(p, *moments[i], p.grad, count, lr, *BETAS, EPS, 0.0)
            p.copy_(theta)
            sums.append(score_sums(p, initial[i], p.grad))
        return torch.stack(sums)

    return step


def by_torch(params: list[Tensor], lr: float, **form: bool) -> Step:
    """torch's own AdamW for the step; the scores parameter by parameter, as before."""
    initial = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr, BETAS, EPS, 0.0, **form)

    @torch.no_grad()
    def step() -> Tensor:
        optimizer.step()
        return torch.stack([score_sums(p, b, p.grad) for p, b in zip(params, initial, strict=True)])

    return step


def flat(params: list[Tensor], lr: float) -> Step:
    """The formula once, over one vector of all parameters; the scores are sums of its segments."""
    whole = torch.cat([p.detach() for p in params])
    b0, m, v = whole.clone(), torch.zeros_like(whole), torch.zeros_like(whole)
    lengths = torch.tensor([len(p) for p in params], device=whole.device)
    segment = torch.repeat_interleave(lengths)
    parts = whole.split(lengths.tolist())
    count = 0

    @torch.no_grad()
    def step() -> Tensor:
        nonlocal count, m, v
        count += 1
        g = torch.cat([p.grad for p in params])
        theta, m, v = adamw(whole, m, v, g, count, lr, *BETAS, EPS, 0.0)
        whole.copy_(theta)
        torch._foreach_copy_(params, parts)
        d = whole - b0
        terms = torch.stack([d.abs(), d * b0, d * whole, g * g])
        return terms.new_zeros(4, len(params)).index_add_(1, segment, terms).T

    return step


RUNGS: dict[str, Callable[[list[Tensor], float], Step]] = {
    "formula": formula,
    "lists": lambda params, lr: by_torch(params, lr, foreach=True),
    "fused": lambda params, lr: by_torch(params, lr, fused=True),
    "flat": flat,
}
