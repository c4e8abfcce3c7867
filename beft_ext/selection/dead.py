"""Dead terms: those whose gradient is zero but for rounding, whatever is learnt.

Softmax ignores what is added to all of a row, so in an attention without rotary embeddings the
key's bias has no effect (docs/definitions.md). Names don't tell. So each attention of the model is
run once more in float64, on what reaches it in a forward. They run one at a time, which takes the
memory of one attention and not of a second model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from posixpath import commonpath
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.models import Bias
from beft_ext.models.offload import bare, device_of
from beft_ext.models.wrappers import sharded

# As a share of the attention's largest gradient. Of all model types of transformers, small and
# random, the least that lives is 3e-5; what is dead stays below 5e-8, the rounding of the fp32
# softmax that some models insist on.
DEAD_SHARE = 1e-6
QKV = ("query", "key", "value")

# Of an attention's forward.
Arguments = tuple[object, ...]
Keywords = dict[str, object]


class ProbeError(BeftError, RuntimeError):
    """An attention that cannot be run in float64."""


def dead_terms(
    model: nn.Module, biases: Iterable[Bias], forward: Callable[[], object]
) -> list[str]:
    """Terms of ``biases`` whose gradient is zero, but for rounding, in every attention.

    Only terms of queries, keys and values can be dead.

    Args:
        biases: they need not be there yet: gradients are taken at the projections' outputs.
        forward: runs ``model`` on a few examples of several tokens, in evaluation mode.
    Raises:
        ProbeError: an attention runs in neither float64 nor float32.
    """
    sizes: dict[str, float] = {}
    with ExitStack() as hooks:
        for path, own in _attentions(biases).items():
            probe = _Probe(path, own, sizes)
            attention = model.get_submodule(path)
            hooks.callback(attention.register_forward_pre_hook(probe, with_kwargs=True).remove)
        with torch.no_grad():
            forward()
    return [term for term, size in sizes.items() if size <= DEAD_SHARE]


def _attentions(biases: Iterable[Bias]) -> dict[str, list[Bias]]:
    """By the path of the innermost module that holds a layer's query, key and value."""
    by_layer: dict[tuple[int, bool], list[Bias]] = {}
    for bias in biases:
        if bias.term.removeprefix("cross_") in QKV:
            key = (bias.layer, bias.term.startswith("cross_"))
            by_layer.setdefault(key, []).append(bias)
    found = {}
    for own in by_layer.values():
        parents = [b.module.rpartition(".")[0].replace(".", "/") for b in own]
        found[commonpath(parents).replace("/", ".")] = own
    return found


class _Probe:
    """A forward pre-hook of an attention, which runs it once more in float64.

    Args:
        sizes: gets each term's largest gradient, as a share of the attention's largest.
    """

    def __init__(self, path: str, biases: list[Bias], sizes: dict[str, float]) -> None:
        self.path, self.biases, self.sizes = path, biases, sizes

    def __call__(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        largest = self._largest(module, args, kwargs)
        most = max(largest.values())
        for term, size in largest.items():
            share = size / most if most > 0 else 1.0  # no gradient at all: nothing is known
            self.sizes[term] = max(share, self.sizes.get(term, 0.0))

    def _largest(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> dict[str, float]:
        """Each term's largest gradient; in float32 where the model's own code has no float64."""
        why: Exception | None = None
        for dtype in (torch.float64, torch.float32):
            try:
                with torch.enable_grad(), torch.autocast("cuda", enabled=False):
                    grads = self._grads(module, args, kwargs, dtype)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                why = why or error
                continue
            found: dict[str, float] = {}
            for bias in self.biases:
                grad = grads.get(bias.module)
                size = 0.0 if grad is None else float(bias.view(grad).abs().max())
                found[bias.term] = max(size, found.get(bias.term, 0.0))
            return found
        reason = (str(why).strip().splitlines() or [type(why).__name__])[0]
        raise ProbeError(
            f"whether a term of '{self.path}' is dead cannot be told: it runs neither in float64 "
            f"nor in float32 ({reason}). Load the model with attn_implementation='sdpa' or 'eager'"
        ) from why

    def _grads(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        dtype: torch.dtype,
    ) -> dict[str, Tensor | None]:
        """Gradients ``(H,)`` at the projections' outputs, of a random sum over the attention's."""
        native = next((t.dtype for t in _tensors((args, kwargs))), torch.get_default_dtype())
        twin = _twin(module, dtype, native)
        added: dict[str, Tensor] = {}
        for path in dict.fromkeys(b.module for b in self.biases):
            inner = twin.get_submodule(path.removeprefix(f"{self.path}."))
            inner.register_forward_hook(_Adding(path, added, dtype))
        here = device_of(twin)
        output = twin.forward(*_cast(args, dtype, here), **_cast(kwargs, dtype, here))
        generator = torch.Generator().manual_seed(0)
        total = sum(
            (t * torch.randn(t.shape, generator=generator).to(t)).sum()
            for t in _tensors(output)
            if t.requires_grad
        )
        grads = torch.autograd.grad(total, list(added.values()), allow_unused=True)
        return dict(zip(added, grads, strict=True))


class _Adding:
    """A forward hook: zeros ``(H,)`` added to a projection's output, where a gradient is taken."""

    def __init__(self, path: str, added: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.path, self.added, self.dtype = path, added, dtype

    def __call__(self, _module: nn.Module, _args: object, output: object) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"'{self.path}' gives out a {type(output).__name__}, not a tensor")
        if self.path not in self.added:
            zeros = output.new_zeros(output.shape[-1], dtype=self.dtype)
            self.added[self.path] = zeros.requires_grad_()
        return output.to(self.dtype) + self.added[self.path]


def _twin(module: nn.Module, dtype: torch.dtype, native: torch.dtype) -> nn.Module:
    """A copy in ``dtype``; modules with quantised weights stay, and are fed in ``native``."""
    if sharded(module):
        raise NotImplementedError("a part of it is sharded by itself: shard whole layers")
    with bare(module):
        twin = copy.deepcopy(module).eval().requires_grad_(False)
    for part in twin.modules():
        own = list(part.parameters(recurse=False))
        if all(type(p) is nn.Parameter and p.is_floating_point() for p in own):
            part._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
        else:
            part.register_forward_pre_hook(lambda _, args: _cast(args, native))
            part.register_forward_hook(lambda _, __, output: _cast(output, dtype))
    return twin


def _cast(value: object, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """Float tensors of nested containers as ``dtype``, on ``device`` where one is given; a cache
    of keys is left out: this run must not add to it."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if any(kind.__name__ == "Cache" for kind in type(value).__mro__):
        return None
    if isinstance(value, dict):
        return {k: _cast(v, dtype, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_cast(v, dtype, device) for v in value)
    return value


def _tensors(value: object) -> list[Tensor]:
    """Float tensors within nested containers."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []
