"""What parameters must be after steps of AdamW: torch.optim.AdamW's, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from draw import EPS, Draw, Fault
from torch import Tensor

HALF = {torch.bfloat16, torch.float16}


class Twin:
    """float64 copies of ``params``, stepped beside them."""

    def __init__(self, draw: Draw, params: list[Tensor]) -> None:
        self.options: dict[str, Any] = {
            "lr": draw.choice([1e-2, 1e-3, 0.3]),
            "weight_decay": draw.choice([0.0, 0.1]),
            "betas": draw.choice([(0.9, 0.999), (0.8, 0.95)]),
            "maximize": draw.chance(0.2),
        }
        self.max_grad_norm = draw.choice([0.0, 0.0, 0.5])
        self.params, self.steps = params, 0
        self.seen = [p.detach().clone() for p in params]
        self.leaves = [p.detach().double().clone().requires_grad_() for p in params]
        # What scores may count from: the value when the optimizer was built, or at its first step
        # where others wrote to it in between.
        self.initial = [[leaf.detach().clone()] for leaf in self.leaves]
        self.optimizer = torch.optim.AdamW(self.leaves, foreach=False, **self.options)

    def add(self, p: Tensor) -> None:
        self.params.append(p)
        self.seen.append(p.detach().clone())
        self.leaves.append(p.detach().double().clone().requires_grad_())
        self.initial.append([p.detach().double().clone()])
        self.optimizer.add_param_group({"params": [self.leaves[-1]]})

    def follow(self, values: Sequence[Tensor]) -> None:
        """Take over what others wrote to the parameters, ``values`` now, since the last step."""
        for i, (value, leaf) in enumerate(zip(values, self.leaves, strict=True)):
            anew = value.double()
            if leaf.numel() == 0:  # its moments hold nothing
                self.optimizer.state.pop(leaf, None)
            if value.shape != leaf.shape:
                if self.optimizer.state.get(leaf):
                    raise Fault("a parameter of another shape went on with the old state")
                self.initial[i].clear()
            else:
                if self.seen[i].dtype == value.dtype and torch.equal(self.seen[i], value):
                    continue
                if self.optimizer.state.get(leaf):
                    anew = torch.where(self.seen[i].double() == anew, leaf.detach(), anew)
            leaf.data = anew.clone()
            if not self.optimizer.state.get(leaf):
                self.initial[i].append(anew.clone())

    def step(self, grads: Sequence[Tensor | None], scale: float | None) -> None:
        for i, (leaf, grad) in enumerate(zip(self.leaves, grads, strict=True)):
            leaf.grad = None
            if grad is None:
                continue
            if grad.numel() != leaf.numel() or not grad.is_floating_point():
                raise Fault(f"a gradient of {tuple(grad.shape)} was taken for parameter {i}")
            plain = grad.detach().to_dense().double().resolve_neg().reshape(leaf.shape)
            leaf.grad = plain.clone() / (scale or 1.0)
        self.norm = math.sqrt(sum(float(g.square().sum()) for g in self.grads() if g is not None))
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.leaves, self.max_grad_norm, foreach=False)
        self.optimizer.step()
        self.steps += 1

    def grads(self) -> list[Tensor | None]:
        return [leaf.grad for leaf in self.leaves]

    def check(self, norm: Tensor) -> None:
        """Raise Fault unless the parameters, and the norm of all gradients, are these."""
        for i, (p, leaf) in enumerate(zip(self.params, self.leaves, strict=True)):
            found, want = p.detach().double(), leaf.detach()
            kinds = {self.seen[i].dtype, p.dtype} & HALF  # without a gradient it stays as it came
            self.seen[i] = p.detach().clone()
            if p.numel() == 0:
                continue
            # Each step rounds the value and its own size, at most a few lr, a few times.
            bound = 4 * self.steps * EPS * (want.abs().max() + 8 * self.options["lr"])
            for kind in kinds:
                bound = bound + want.abs() * torch.finfo(kind).eps / 2 + 2**-25
            error = (found - want).abs()
            if not bool((error <= bound).all()):
                raise Fault(
                    f"parameter {i}, {p.dtype}, is off by {error.max():.3g} at step {self.steps}"
                )
        if not abs(float(norm) - self.norm) <= 1e-3 * self.norm + 1e-30:
            raise Fault(f"the norm is {float(norm):.4g}, not {self.norm:.4g}")

    def check_change(self, i: int, mean: float) -> None:
        """Raise Fault unless ``mean`` is that of ``|b - b0|`` of parameter ``i``."""
        now = self.leaves[i].detach()
        wants = [float((now - initial).abs().mean()) for initial in self.initial[i]]
        slack = 1e-5 * float(now.abs().max() + self.options["lr"])
        if not any(abs(mean - want) <= 1e-3 * want + slack for want in wants):
            raise Fault(f"the mean change of {i} is {mean:.4g}, not {wants}")
