"""Adapters on a model: loaded, switched, and told apart from the base values.

A loaded adapter lives in the model's own parameters: no wrapper, no second model. What is kept
beside them, on the model but out of its ``state_dict``, is each adapter's differences and, while
one is active, the base values of what it changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from beft_ext.adapters.contents import AdapterError, Contents, head_modules
from beft_ext.adapters.hub import located
from beft_ext.adapters.reading import read
from beft_ext.models import (
    BiasError,
    Plain,
    add_bias,
    find_projections,
    offload,
    spell,
    state,
    wrappers,
)
from beft_ext.tap import require_untapped
from beft_ext.training.preparation import Prepared, PrepareError, prepare, prepared_of, restore


@dataclass
class Adapters(state.Record):
    """The adapters of a model, kept on it.

    Attributes:
        named: what each loaded adapter changes, by its name.
        base: values before the active adapter, by tensor name. None where there was no bias.
        active: name of the active adapter; None where there is none.
        guards: handles of the hooks that refuse ``load_state_dict`` while one is active.
    """

    named: dict[str, Contents] = field(default_factory=dict)
    base: dict[str, Tensor | None] = field(default_factory=dict)
    active: str | None = None
    guards: list[RemovableHandle] = field(default_factory=list, repr=False)

    def claim(self) -> str | None:
        if self.active is None:
            return None
        return (
            f"adapter '{self.active}' is active: set_adapter(model, None) first; to train it on, "
            "load it with trainable=True"
        )


@dataclass
class Merged(state.Record):
    """What ``unmerge_adapter`` needs."""

    plain: Plain
    prepared: Prepared | None
    adapters: Adapters | None

    def claim(self) -> str:
        return "an adapter is merged here: unmerge_adapter, or load the merged folder"


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Read an adapter that ``save_adapter`` or PEFT wrote, and make it the active one.

    Each bias becomes the base value plus the adapter's difference, in the bias's dtype. A
    projection without a bias has one as long as the adapter is active.

    Args:
        model: a transformers model, in one process or under ``fully_shard``.
        folder: what ``save_adapter`` or PEFT's ``save_pretrained`` wrote; or "user/name" on the
            hub, where there is no such folder.
        name: what ``set_adapter`` will call it. An adapter of the same name is replaced. Without
            effect where the adapter is trained on.
        trainable: train it on. A model that is not prepared is, with the adapter's terms; the
            biases and head that were prepared take the adapter's values.
        revision: a branch, tag or commit on the hub; by default the main branch.
        token: of the hub; by default that of ``hf auth login`` or HF_TOKEN.
    Returns:
        The model that was given.
    Raises:
        AdapterError: an adapter of another architecture, width or number of layers; a file that
            is damaged or unsafe (a wrong digest, a pickle, NaN, a link out of the folder); a
            value that the model's dtype cannot hold, or that a tied tensor cannot take; a
            prepared model without ``trainable``; an adapter that changes more than what was
            prepared; a model that is merged, tapped, wrapped by PEFT, or spread over processes; a
            name that the hub does not give. The model is as it was.
    Example:
        >>> import copy, beft_ext
        >>> base = copy.deepcopy(model)
        >>> prepared = beft_ext.prepare(model)
        >>> optimizer = beft_ext.BiasAdamW(model, lr=0.1)
        >>> model(**loader[0]).loss.backward()
        >>> optimizer.step()
        >>> beft_ext.save_adapter(model, "adapter")
        >>> base = beft_ext.load_adapter(base, "adapter")
        >>> model(**loader[0]).logits.allclose(base(**loader[0]).logits)
        True
    """
    if not isinstance(name, str) or not name:
        raise AdapterError("an adapter's name is a string that is not empty")
    inner = wrappers.whole(model, AdapterError)
    _require_free(inner)
    if prepared_of(inner) is not None and not trainable:
        raise AdapterError(
            "this model is prepared: to train on from the adapter, load it with trainable=True; "
            "else call restore(model) first"
        )
    contents = read(located(folder, revision, token), inner)
    if trainable:
        _train_on(model, contents)
        return model
    adapters = state.get(inner, Adapters) or Adapters()
    before = adapters.active
    _deactivate(inner, adapters)
    try:
        _activate(inner, adapters, name, contents)
    except AdapterError:
        if before is not None:
            _activate(inner, adapters, before, adapters.named[before])
        raise
    state.put(inner, adapters)
    return model


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switch to another loaded adapter, or back to the base model.

    Args:
        model: a model on which ``load_adapter`` was called.
        name: a loaded adapter's; None for the base values, which come back to the bit.
    Raises:
        AdapterError: no adapter of that name is loaded; an adapter is merged; the model is tapped,
            wrapped by PEFT, or spread over processes. Or the model's dtype was changed
            and cannot hold a value: the model is at its base values then.
    Example:
        >>> import beft_ext
        >>> prepared = beft_ext.prepare(model)
        >>> beft_ext.save_adapter(model, "adapter")
        >>> beft_ext.restore(model)
        >>> model = beft_ext.load_adapter(model, "adapter", name="first")
        >>> beft_ext.set_adapter(model, None)
        >>> beft_ext.set_adapter(model, "first")
    """
    model = wrappers.whole(model, AdapterError)
    adapters = _loaded(model, name)
    _deactivate(model, adapters)
    if name is not None:
        _activate(model, adapters, name, adapters.named[name])


def delete_adapter(model: nn.Module, name: str = "default") -> None:
    """Forget a loaded adapter; where it is the active one, the base values come back first.

    Args:
        model: a model on which ``load_adapter`` was called.
        name: a loaded adapter's.
    Raises:
        AdapterError: no adapter of that name is loaded; an adapter is merged; the model is tapped,
            wrapped by PEFT, or spread over processes.
    Example:
        >>> import beft_ext
        >>> prepared = beft_ext.prepare(model)
        >>> beft_ext.save_adapter(model, "adapter")
        >>> beft_ext.restore(model)
        >>> model = beft_ext.load_adapter(model, "adapter", name="first")
        >>> beft_ext.delete_adapter(model, "first")
    """
    model = wrappers.whole(model, AdapterError)
    adapters = _loaded(model, name)
    if name == adapters.active:
        _deactivate(model, adapters)
    del adapters.named[name]


def _loaded(model: nn.Module, name: str | None) -> Adapters:
    """The model's adapters. Raises AdapterError where they cannot be switched to ``name``."""
    _require_free(model)
    adapters = state.get(model, Adapters)
    if adapters is None or (name is not None and name not in adapters.named):
        loaded = ", ".join(adapters.named) if adapters is not None else ""
        raise AdapterError(f"no adapter '{name}' on this model: loaded are {loaded or 'none'}")
    return adapters


def _require_free(model: nn.Module) -> None:
    require_untapped(model, AdapterError)  # the tap holds the biases that would go
    if state.get(model, Merged) is not None:
        raise AdapterError("an adapter is merged here: call unmerge_adapter(model) first")


def _train_on(given: nn.Module, contents: Contents) -> None:
    """Give what is prepared, or the adapter's own terms, the values of ``contents``."""
    model = wrappers.inside(given)
    prepared, before = prepared_of(model), state.get(model, Adapters)
    if prepared is not None:
        _continue_from(model, prepared, contents)
        return
    try:
        prepared = prepare(given, _terms(model, contents))
    except (PrepareError, BiasError) as error:
        raise AdapterError(str(error)) from error
    try:
        _continue_from(model, prepared, contents)
    except AdapterError:
        restore(model)
        if before is not None:  # forgotten by prepare
            state.put(model, before)
        raise


def _terms(model: nn.Module, contents: Contents) -> tuple[str, ...]:
    """What the adapter says that it trained, or every term of the modules that PEFT names."""
    if contents.terms:
        return contents.terms
    found = [p.bias for p in find_projections(model)]
    own = [b for b in found if b.module in contents.biases]
    if not own:
        raise AdapterError("the adapter has no bias of a known term: it loads, but not to train")
    return spell(own, found)


def _continue_from(model: nn.Module, prepared: Prepared, contents: Contents) -> None:
    """Set the prepared biases and head to the adapter's; all is checked before."""
    _check_ties(model, contents)
    left = {m: t.clone() for m, t in contents.biases.items()}
    values: list[tuple[str, Tensor, Tensor]] = []
    for bias in prepared.biases:
        into = bias.view(model.get_parameter(bias.parameter).detach())
        value = prepared.initial[bias.name].double().view(into.shape)
        if bias.module in left:
            difference = bias.view(left[bias.module])
            value = value + difference.to(value.device, torch.float64)
            difference.zero_()
        values.append((bias.parameter, into, value))
    if more := [m for m, t in left.items() if bool(t.any())]:
        raise AdapterError(
            f"the adapter changes '{more[0]}' beyond the prepared biases: prepare its terms too"
        )
    inside = tuple(f"{m}." for m in head_modules(model, prepared.head))
    for name, value in contents.head.items():
        if not name.startswith(inside):
            raise AdapterError(f"the adapter changes '{name}', which is not in the prepared head")
        values.append((name, _tensor(model, name), value))
    for name, into, value in values:
        _check_finite(name, value.to(into.dtype))
    for _, into, value in values:
        into.copy_(value)


def _deactivate(model: nn.Module, adapters: Adapters) -> None:
    """Back to the base values, to the bit."""
    _require_unsharded(model, adapters.base)
    for key, base in adapters.base.items():
        if base is None:
            model.get_submodule(key.removesuffix(".bias")).bias = None
        else:
            _tensor(model, key).copy_(base)
    offload.put_back(model, [key for key, base in adapters.base.items() if base is not None])
    release(adapters)
    adapters.active = None
    adapters.base.clear()


def _activate(model: nn.Module, adapters: Adapters, name: str, contents: Contents) -> None:
    """From the base values to those of ``contents``, which is kept under ``name``.

    Raises:
        AdapterError: a value does not fit. The model is at its base, the kept adapters as before.
    """
    _check_ties(model, contents)
    _require_unsharded(model, [*(f"{m}.bias" for m in contents.biases), *contents.head])
    modules = [model.get_submodule(path) for path in contents.biases]
    biased = zip(contents.biases, modules, strict=True)
    offload.take(model, [f"{p}.bias" for p, m in biased if m.bias is not None])
    offload.take(model, contents.head)
    try:
        for module, (path, difference) in zip(modules, contents.biases.items(), strict=True):
            key = f"{path}.bias"
            adapters.base[key] = None if module.bias is None else module.bias.detach().clone()
            into = (add_bias(model, path) if module.bias is None else module.bias).detach()
            into.copy_(into.double() + difference.to(into.device, torch.float64))
            if adapters.base[key] is None:
                module.bias.requires_grad_(False)
            _check_finite(key, into)
        for key, value in contents.head.items():
            into = _tensor(model, key)
            adapters.base[key] = into.clone()
            into.copy_(value)
            _check_finite(key, into)
    except AdapterError:
        _deactivate(model, adapters)
        raise
    adapters.named[name], adapters.active = contents, name
    guard(model, adapters)


def guard(model: nn.Module, adapters: Adapters) -> None:
    """Refuse ``load_state_dict`` from now on, into the model and into each biased module alone."""
    modules = map(model.get_submodule, adapters.named[adapters.active or ""].biases)
    hooks = (m.register_load_state_dict_pre_hook(_refuse) for m in dict.fromkeys([model, *modules]))
    adapters.guards += hooks


def release(adapters: Adapters) -> None:
    """Let ``load_state_dict`` through again."""
    for handle in adapters.guards:
        handle.remove()
    adapters.guards.clear()


def _refuse(*_: object) -> None:
    raise AdapterError(
        "load_state_dict would write over the base values of an active adapter: call "
        "set_adapter(model, None) first"
    )


def _require_unsharded(model: nn.Module, names: Iterable[str]) -> None:
    own = dict(model.named_parameters(remove_duplicate=False))
    wrappers.require_unsharded({n: own[n] for n in names if n in own}, AdapterError)


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer, sharing its memory."""
    module, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), leaf)
    return tensor.detach()


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise AdapterError(
            f"the adapter's value for '{name}' is beyond what {value.dtype} can hold: load the "
            "model in a wider dtype, such as bfloat16 or float32"
        )


def _check_ties(model: nn.Module, contents: Contents) -> None:
    """A parameter of several modules can take only what the adapter has for all of them."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{path}.{leaf}".lstrip("."))
    differences = {f"{m}.bias": t for m, t in contents.biases.items()}
    own = differences | contents.head
    for tied in names.values():
        given = {n: own[n] for n in tied if n in own}
        if len(tied) == 1 or not given:
            continue
        for name, value in given.items():
            bias = name in differences
            as_is = torch.zeros_like(value) if bias else offload.value_of(model, name)
            others = [given.get(n) for n in tied]
            same = all(o is not None and torch.equal(o, value) for o in others)
            if not same and not torch.equal(value.to(as_is), as_is):
                other = next(n for n in tied if n != name)
                raise AdapterError(
                    f"the adapter has a value of its own for '{name}', which in this model is tied "
                    f"to '{other}': it comes from a model whose tie was undone; load it with PEFT"
                )
