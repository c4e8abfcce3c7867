"""``prepare`` a model for training chosen bias terms and the head alone; ``restore`` undoes it.

What trains are plain parameters with ``requires_grad``, so any training loop works. A slice of a
fused QKV parameter trains through the whole parameter: a hook sets the rest of the gradient to
zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from beft_ext.errors import BeftError, BeftWarning
from beft_ext.models import (
    Bias,
    BiasError,
    Projection,
    add_bias,
    find_projections,
    head_parameters,
    offload,
    parse_terms,
    pick,
    require_fit,
    spell,
    state,
    wrappers,
)
from beft_ext.tap import require_untapped


class PrepareError(BeftError, ValueError):
    """A model that cannot be prepared or restored as asked; it is as it was before."""


@dataclass(repr=False)
class Prepared(state.Record):
    """What ``prepare`` made trainable; printed, it is a table of the terms and the head.

    Attributes:
        model_type: that of the model's config; empty for a model without one.
        terms: the set of terms, as ``prepare`` takes it; one without layers is in all of its.
        layers: numbers of the layers in which a bias trains.
        biases: the biases that train.
        added: names of the parameters that were added.
        initial: value ``(H,)`` of each bias before training, by ``Bias.name``; zero for an
            added one.
        head: names of the head's parameters.
        head_initial: their values before training, by name.
        parameters: number of the model's elements, the added ones included.
        adapter_bytes: size of the tensors that ``save_adapter`` writes.
        required: ``requires_grad`` of each parameter before, by name.
        beside: parameters of the wrapper around the model, which are frozen too, with theirs.
        outside: what keeps the rest of fused parameters from training; a deep copy of the model
            takes it along.
        again: handles of the hooks by which a backward reads offloaded weights.
    Example:
        >>> import beft_ext
        >>> prepared = beft_ext.prepare(model, terms="value")
        >>> [bias.name for bias in prepared.biases], prepared.head
        (['0.value', '1.value'], ['classifier.weight', 'classifier.bias'])
    """

    model_type: str
    terms: tuple[str, ...]
    layers: tuple[int, ...]
    biases: list[Bias]
    added: list[str]
    initial: dict[str, Tensor] = field(repr=False)
    head: list[str]
    head_initial: dict[str, Tensor] = field(repr=False)
    parameters: int
    adapter_bytes: int
    required: dict[str, bool] = field(repr=False)
    beside: list[tuple[nn.Parameter, bool]] = field(default_factory=list, repr=False)
    outside: list[_Outside] = field(default_factory=list, repr=False)
    again: list[RemovableHandle] = field(default_factory=list, repr=False)

    def claim(self) -> str:
        return "this model is prepared already: call restore(model) first"

    def __repr__(self) -> str:
        return f"<Prepared: {'+'.join(self.terms)}\n {self._size()}>"

    def __str__(self) -> str:
        column = max(18, *(1 + len(term) for term in self.terms))
        lines = [f"{'trains':<{column}}{'layers':>7}{'elements':>11}  first parameter"]
        for entry in parse_terms(self.terms):
            own = [b for b in self.biases if entry.holds(b)]
            if not own:  # tied to the biases of another row
                continue
            elements = sum(b.width for b in own)
            note = " (added)" if own[0].parameter in self.added else ""
            layers = len({b.layer for b in own})
            row = f"{entry!s:<{column}}{layers:>7}{elements:>11}  {own[0].parameter}{note}"
            lines.append(row)
        head = sum(t.numel() for t in self.head_initial.values())
        lines.append(f"{'head':<{column}}{'':>7}{head:>11}  {', '.join(self.head) or 'none'}")
        return "\n".join([*lines, self._size()])

    def _size(self) -> str:
        biases = sum(b.width for b in self.biases)
        head = sum(t.numel() for t in self.head_initial.values())
        share = 100 * biases / self.parameters
        return (
            f"biases: {biases:,} of {self.parameters:,} parameters ({share:.4f} %); with the "
            f"head {biases + head:,}; adapter {self.adapter_bytes:,} bytes"
        )


def prepare(
    model: nn.Module,
    terms: str | Iterable[str] = "value",
    layers: Iterable[int] | None = None,
    biases: Iterable[Bias] | None = None,
) -> Prepared:
    """Freeze everything but the biases of the chosen terms and the task head.

    A projection without a bias (LLaMA, Mistral, Gemma, GPT-J, T5) gets one of zeros, ``(H,)`` in
    the weight's dtype. ``save_pretrained`` writes it, but ``from_pretrained`` does not read it
    again: a warning says so. An optimizer's weight decay reaches all of a fused QKV parameter,
    so keep it at zero there; ``BiasAdamW`` does by default.

    What ``prepare`` leaves on the model is not in its ``state_dict``. A deep copy of the model is
    prepared too. Loaded adapters that are not active are forgotten.

    Args:
        model: a transformers model, plain, in DistributedDataParallel or under ``fully_shard``
            (docs/large-models.md). Prepare first and wrap in DDP then: an added bias is refused in
            a wrapped model, and what is frozen after the wrapping needs
            ``find_unused_parameters=True``. Prepare before or after ``fully_shard``.
        terms: a set of terms, as text ("value", "value@6-11+query") or as the texts of its parts.
            ``value@6-11`` is the value in layers 6 to 11, ``value@3`` in layer 3 alone.
        layers: numbers of the layers, from 0; by default all.
        biases: the biases to choose from, such as ``find_biases(model, names=...)`` for an
            architecture that is not known; by default those of every known projection.
    Returns:
        What trains.
    Raises:
        PrepareError: an unknown term; a layer out of range; a norm that has no bias (RMSNorm); a
            quantised head; a bias of another model, or one that is sharded; a model that is
            prepared, merged or tapped, has an active adapter, is wrapped by PEFT, or is spread over
            processes or devices in another way than ``fully_shard``'s. Nothing was changed.
    Example:
        >>> import beft_ext
        >>> prepared = beft_ext.prepare(model, terms=["query", "value"], layers=[1])
        >>> trained = [name for name, p in model.named_parameters() if p.requires_grad]
        >>> len(trained), trained[0]
        (4, 'bert.encoder.layer.1.attention.self.query.bias')
    """
    replicated, beside = wrappers.replicated(model), wrappers.beside(model)
    model = wrappers.whole(model, PrepareError, replicas=True)
    _check_free(model)
    found = _projections(model, biases)
    chosen = _choose(found, terms, layers)
    if replicated and (lacking := next((p.bias for p in chosen if not p.has_bias), None)):
        raise PrepareError(
            f"a bias would be added to '{lacking.module}', and DistributedDataParallel adds up no "
            "gradients of what it does not know: prepare the model first, then wrap it"
        )
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    head = _head(model)
    there = {p.bias.parameter: model.get_parameter(p.bias.parameter) for p in chosen if p.has_bias}
    wrappers.require_unsharded(there | head, PrepareError)
    added = list(dict.fromkeys(p.bias.module for p in chosen if not p.has_bias))
    for module in added:
        add_bias(model, module)
    # Tied projections hold one parameter under several modules: it is one bias here.
    own = list({(p.bias.parameter, p.bias.term): p.bias for p in chosen}.values())
    offload.take(model, [*head, *(b.parameter for b in own)])
    head = {n: model.get_parameter(n) for n in head}
    prepared = Prepared(
        model_type=str(getattr(getattr(model, "config", None), "model_type", "")),
        terms=spell((p.bias for p in chosen), (p.bias for p in found)),
        layers=tuple(sorted({b.layer for b in own})),
        biases=own,
        added=[f"{module}.bias" for module in added],
        initial={b.name: b.read(model.get_parameter(b.parameter)) for b in own},
        head=list(head),
        head_initial={n: p.detach().clone() for n, p in head.items()},
        parameters=sum(p.numel() for p in model.parameters()),
        adapter_bytes=_adapter_bytes(model, own, head.values()),
        required=required,
        beside=[(p, p.requires_grad) for p in beside],
    )
    mark(model, prepared)
    if added:
        warnings.warn(
            f"{type(model).__name__} has no bias in '{added[0]}', so one was added: "
            "save_pretrained writes it but from_pretrained drops it; use save_adapter, or "
            "merge_adapter first",
            BeftWarning,
            stacklevel=2,
        )
    return prepared


def restore(model: nn.Module) -> None:
    """Undo ``prepare``: ``requires_grad`` is as before, hooks and added biases are gone.

    Trained values of the head, and of biases that the model had, stay. Those of added biases are
    lost: save or merge the adapter first.

    Args:
        model: a prepared model.
    Raises:
        PrepareError: the model is not prepared, or is tapped.
    Example:
        >>> import beft_ext
        >>> prepared = beft_ext.prepare(model)
        >>> beft_ext.restore(model)
        >>> all(p.requires_grad for p in model.parameters())
        True
    """
    model = wrappers.inside(model)
    require_untapped(model, PrepareError)
    prepared = unmark(model)
    for name in prepared.added:
        model.get_submodule(name.removesuffix(".bias")).bias = None
    own = dict.fromkeys(b.parameter for b in prepared.biases if b.parameter not in prepared.added)
    offload.put_back(model, [*prepared.head, *own])


def trained_slices(model: nn.Module) -> list[tuple[str, nn.Parameter, Bias | None]]:
    """Every parameter that requires grad, by name, with the part of it that trains.

    One entry per prepared bias (``bias.view(parameter)`` is the part); None as the bias for all
    of a parameter: the head's, or any of a model that was never prepared.
    """
    prepared = prepared_of(model)
    biases: dict[str, list[Bias]] = {}
    for bias in prepared.biases if prepared is not None else ():
        biases.setdefault(bias.parameter, []).append(bias)
    parts: list[tuple[str, nn.Parameter, Bias | None]] = []
    for name, parameter in wrappers.inside(model).named_parameters():
        if parameter.requires_grad:
            parts += [(name, parameter, b) for b in biases.get(name, [None])]
    return parts


def prepared_of(model: nn.Module) -> Prepared | None:
    """What ``prepare`` left on the model, or None."""
    return state.get(model, Prepared)


def mark(model: nn.Module, prepared: Prepared) -> None:
    """Set ``requires_grad`` and the hooks that ``prepared`` asks for, and leave it on the model."""
    model.requires_grad_(False)
    for parameter, _ in prepared.beside:
        parameter.requires_grad_(False)
    for name in (*prepared.head, *(b.parameter for b in prepared.biases)):
        model.get_parameter(name).requires_grad_(True)
    by_parameter: dict[str, list[Bias]] = {}
    for bias in prepared.biases:
        by_parameter.setdefault(bias.parameter, []).append(bias)
    for name, own in by_parameter.items():
        parameter = model.get_parameter(name)
        if sum(b.width for b in own) < parameter.numel():
            prepared.outside.append(_Outside(parameter, own))
    prepared.again = offload.rereading(model)
    state.put(model, prepared)


def unmark(model: nn.Module) -> Prepared:
    """Undo ``mark``; values stay. Raises PrepareError where the model is not prepared."""
    prepared = prepared_of(model)
    if prepared is None:
        raise PrepareError("this model is not prepared: there is nothing to restore")
    for outside in prepared.outside:
        outside.handle.remove()
    prepared.outside.clear()
    for handle in prepared.again:
        handle.remove()
    prepared.again.clear()
    for parameter, required in prepared.beside:
        parameter.requires_grad_(required)
    as_before = any(prepared.required.values())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(prepared.required.get(name, as_before))
        if not parameter.requires_grad:
            parameter.grad = None
    state.take(model, Prepared)
    return prepared


class _Outside:
    """Keeps a fused parameter ``(P,)`` from training outside its trained slices, by a hook.

    torch drops the hooks of a tensor that is copied or pickled. This object lies on the model,
    so it is copied along, and sets the hook on the copy.
    """

    def __init__(self, parameter: nn.Parameter, biases: list[Bias]) -> None:
        self.parameter, self.biases = parameter, biases
        inside = torch.zeros_like(parameter, dtype=torch.bool, requires_grad=False)
        for bias in biases:
            bias.view(inside).fill_(True)
        required = parameter.requires_grad
        parameter.requires_grad_(True)  # else torch takes no hook; a copy may be of a frozen one
        self.handle = parameter.register_hook(_Mask(inside))
        parameter.requires_grad_(required)

    def __reduce__(self) -> tuple[type[_Outside], tuple[nn.Parameter, list[Bias]]]:
        return _Outside, (self.parameter, self.biases)


class _Mask:
    """A gradient hook: zero where ``inside`` is false."""

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    def __call__(self, grad: Tensor) -> Tensor:
        if self.inside.device != grad.device:
            self.inside = self.inside.to(grad.device)
        # Not a product: what is not finite outside must not reach the norm of the gradient.
        return grad.where(self.inside, 0)


def _check_free(model: nn.Module) -> None:
    require_untapped(model, PrepareError)
    for why in state.claims(model):
        raise PrepareError(why)
    # The base values that an inactive adapter is added to would be wrong after training.
    state.clear(model)


def _projections(model: nn.Module, biases: Iterable[Bias] | None) -> list[Projection]:
    if biases is not None:
        biases = list(biases)
        require_fit(model, biases, PrepareError)
        return [Projection(b, has_bias=True, linear=True) for b in biases]
    try:
        return find_projections(model)
    except BiasError as error:
        raise PrepareError(str(error)) from error


def _choose(
    found: list[Projection], terms: str | Iterable[str], layers: Iterable[int] | None
) -> list[Projection]:
    count = 1 + max((p.bias.layer for p in found), default=-1)
    inside = set(range(count)) if layers is None else set(layers)
    if out := sorted(inside - set(range(count))):
        raise PrepareError(f"layer {out[0]} is out of range: the model has 0 to {count - 1}")
    try:
        picked = pick((p.bias for p in found), terms)
    except BiasError as error:
        raise PrepareError(str(error)) from error
    for entry in dict.fromkeys(picked.values()):
        if not any(b.layer in inside for b, own in picked.items() if own == entry):
            raise PrepareError(f"term '{entry}' is in none of the layers asked for")
    chosen = [p for p in found if p.bias in picked and p.bias.layer in inside]
    if lacking := next((p.bias for p in chosen if not (p.has_bias or p.linear)), None):
        raise PrepareError(
            f"'{lacking.module}' is a norm without a bias (RMSNorm), and none is added there: "
            "choose the term of a linear projection"
        )
    return chosen


def _head(model: nn.Module) -> dict[str, nn.Parameter]:
    try:
        ids = {id(p) for p in head_parameters(model)}
    except BiasError as error:
        raise PrepareError(str(error)) from error
    return {n: p for n, p in model.named_parameters() if id(p) in ids}


def _adapter_bytes(model: nn.Module, biases: list[Bias], head: Iterable[Tensor]) -> int:
    """Bytes of the saved tensors: whole fp32 vectors of the biased modules, and the head."""
    modules = {b.module: model.get_parameter(b.parameter) for b in biases}
    vectors = sum(p.numel() * max(4, p.element_size()) for p in modules.values())
    return vectors + sum(p.numel() * p.element_size() for p in head)
