"""The tap: the one place that touches a model's forward and backward.

A forward hook on a projection passes its output through an identity whose backward calls
``bias_grad_stats`` once. The projection's own bias is frozen, so autograd does not reduce
``grad_output`` a second time; what trains is a leaf tensor over the same memory, one per bias
(a slice of a fused QKV parameter has its own). Forward is unchanged to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.models import Bias, BiasMap, state
from beft_ext.ops import bias_grad_stats
from beft_ext.ops.reference import example_grads


class TapError(BeftError, RuntimeError):
    """A model that cannot be tapped as asked."""


@dataclass
class Site:
    """One biased projection: its biases, their trainable leaves, its statistics.

    The statistics cover the whole parameter, ``(P,)``; a bias reads its slice of them.
    """

    parameter: nn.Parameter
    biases: list[Bias]
    leaves: list[Tensor]
    grad_sum: Tensor
    grad_sum_sq: Tensor
    shared: bool
    pending: Tensor | None = field(default=None)  # (B, P) of a shared site, within one step


class _Step:
    """What a backward must know of the step that it belongs to."""

    batch: int | None = None
    scale: float = 1.0
    offsets: Tensor | None = None


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(output: Tensor, site: Site, step: _Step, *leaves: Tensor) -> Tensor:
        # The same memory, but no view to autograd: Longformer scales its query in place.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.site, ctx.step = inputs[1], inputs[2]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        site, step = ctx.site, ctx.step
        grad = _reduce(site, step, grad_output)
        pairs = zip(site.biases, site.leaves, strict=True)
        grads = (bias.view(grad).to(leaf.dtype) for bias, leaf in pairs)
        return grad_output, None, None, *grads


def _reduce(site: Site, step: _Step, grad_output: Tensor) -> Tensor:
    dy = _by_example(grad_output, step)
    if site.shared:
        # Squares may be taken only of the sum over all uses: keep (B, P) until the step ends.
        grads = example_grads(dy, step.offsets) * step.scale
        site.pending = grads if site.pending is None else site.pending + grads
        return grads.sum(0) / step.scale
    return bias_grad_stats(
        dy, site.grad_sum, site.grad_sum_sq, example_offsets=step.offsets, scale=step.scale
    )


def _by_example(grad_output: Tensor, step: _Step) -> Tensor:
    """``(B, T, H)``, or ``(N, H)`` for packed sequences, from what the projection gave out."""
    width = grad_output.shape[-1]
    if step.offsets is not None:
        return grad_output.reshape(-1, width)
    batch = step.batch or grad_output.shape[0]
    rows = grad_output.numel() // width
    if rows % batch:
        raise TapError(
            f"a projection's output of shape {tuple(grad_output.shape)} cannot be divided among "
            f"{batch} examples: pass example_offsets to Tap.step for packed sequences"
        )
    return grad_output.reshape(batch, rows // batch, width)


def require_untapped(model: nn.Module) -> None:
    """Raise TapError where ``model`` carries a tap."""
    if state.get(model, Tap) is not None:
        raise TapError("this model is tapped already: remove the first tap before another")


class Tap(AbstractContextManager["Tap"], state.Record):
    """Listens at every bias of ``biases`` in ``model`` until removed (or as a context manager).

    Raises TapError where the model is tapped already.
    """

    def __init__(self, model: nn.Module, biases: BiasMap | Iterable[Bias]) -> None:
        require_untapped(model)
        self._model, self._step = model, _Step()
        self._hooks: list[Any] = []
        self.sites: list[Site] = []
        by_parameter: dict[int, Site] = {}
        tapped: set[str] = set()
        for bias in biases:
            parameter = model.get_parameter(bias.parameter)
            site = by_parameter.get(id(parameter))
            if site is None:
                site = by_parameter[id(parameter)] = _site(parameter)
                self.sites.append(site)
            site.shared |= bias.shared
            site.biases.append(bias)
            site.leaves.append(bias.view(parameter.detach()).requires_grad_())
        self._required = [(s.parameter, s.parameter.requires_grad) for s in self.sites]
        for bias in (b for s in self.sites for b in s.biases):
            if bias.module not in tapped:
                tapped.add(bias.module)
                self._listen(model.get_submodule(bias.module))
        for site in self.sites:
            site.parameter.requires_grad_(False)
        state.put(model, self)

    def _listen(self, module: nn.Module) -> None:
        owned = {id(p) for p in module.parameters(recurse=False)}
        site, step = next(s for s in self.sites if id(s.parameter) in owned), self._step

        def hook(_module: nn.Module, _args: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                kind = type(module).__name__
                raise TapError(f"a {kind} gives out a {type(output).__name__}, not a tensor")
            tapped: Tensor = _Identity.apply(output, site, step, *site.leaves)
            return tapped

        self._hooks.append(module.register_forward_hook(hook))

    def step(self, batch: int, scale: float = 1.0, example_offsets: Tensor | None = None) -> None:
        """Announce the next forward and backward: ``batch`` examples, and ``scale``, the number
        that the loss was divided by (``batch`` for a mean over examples)."""
        self.finish_step()
        self._step.batch, self._step.scale, self._step.offsets = batch, scale, example_offsets

    def finish_step(self) -> None:
        """Square what sites used several times in one step have gathered."""
        for site in self.sites:
            if site.pending is not None:
                site.grad_sum += site.pending.sum(0)
                site.grad_sum_sq += site.pending.square().sum(0)
                site.pending = None

    def leaves(self) -> list[tuple[Bias, Tensor]]:
        """Every bias with the tensor that an optimizer trains, ``(groups, width / groups)``."""
        return [p for s in self.sites for p in zip(s.biases, s.leaves, strict=True)]

    def statistics(self) -> dict[Bias, tuple[Tensor, Tensor]]:
        """``sum_i scale*g_i`` and ``sum_i (scale*g_i)^2`` of each bias since the tap was set."""
        self.finish_step()
        return {
            b: (b.read(s.grad_sum), b.read(s.grad_sum_sq)) for s in self.sites for b in s.biases
        }

    def remove(self) -> None:
        """Take every hook away; ``requires_grad`` is as before. Trained values stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        state.take(self._model, Tap)

    def __exit__(self, *_: object) -> None:
        self.remove()


def _site(parameter: nn.Parameter) -> Site:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    return Site(parameter, [], [], zeros, zeros.clone(), shared=False)
