"""Adapters on a model: loaded, switched, and told apart from the base values.

A loaded adapter lives in the model's own parameters: no wrapper, no second model. What is kept
beside them, on the model but out of its ``state_dict``, is each adapter's differences and, while
one is active, the base values of what it changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from beft_ext.adapters.contents import AdapterError, Contents, head_modules, read
from beft_ext.models import Plain, add_bias, state, wrappers
from beft_ext.training.preparation import Prepared, prepared_of


@dataclass
class Adapters(state.Record):
    """Kept on a model.

    base: while one is active, the values without it by tensor name; None where there is no bias
        then.
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
            "load it after prepare"
        )


@dataclass
class Merged(state.Record):
    """What ``unmerge_adapter`` needs."""

    plain: Plain
    prepared: Prepared | None
    adapters: Adapters | None

    def claim(self) -> str:
        return "an adapter is merged here: unmerge_adapter, or load the merged folder"


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Read an adapter that ``save_adapter`` or PEFT wrote, and make it the active one.

    On a model that is not prepared, the adapter is kept under ``name``, in place of one of that
    name. Base + difference becomes the value of each bias, in the bias's dtype. Projections
    without a bias get one as long as the adapter is active. On a prepared model, training goes on
    from the adapter, which must lie within what was prepared.

    Raises: AdapterError, the model as it was, for an adapter of another architecture, width or
        layer count; for files that are damaged or unsafe (a digest that is not theirs, a pickle,
        NaN, a link out of the folder); for values that the model's dtype cannot hold, or that
        a tied tensor cannot take; for a model in several processes or wrapped by PEFT.
    """
    if not isinstance(name, str) or not name:
        raise AdapterError("an adapter's name is a string that is not empty")
    model = wrappers.whole(model, AdapterError)
    _require_unmerged(model)
    contents = read(Path(folder), model)
    prepared = prepared_of(model)
    if prepared is not None:
        _continue_from(model, prepared, contents)
        return
    adapters = state.get(model, Adapters) or Adapters()
    before = adapters.active
    _deactivate(model, adapters)
    try:
        _activate(model, adapters, name, contents)
    except AdapterError:
        if before is not None:
            _activate(model, adapters, before, adapters.named[before])
        raise
    state.put(model, adapters)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switch to the loaded adapter ``name``, or with None back to the base model, to the bit.

    Raises: AdapterError for a name that was not loaded, or values that the model's dtype, changed
        since, cannot hold; the model is at its base then.
    """
    model = wrappers.whole(model, AdapterError)
    adapters = state.get(model, Adapters)
    _require_unmerged(model)
    if adapters is None or (name is not None and name not in adapters.named):
        loaded = ", ".join(adapters.named) if adapters is not None else ""
        raise AdapterError(f"no adapter '{name}' on this model: loaded are {loaded or 'none'}")
    _deactivate(model, adapters)
    if name is not None:
        _activate(model, adapters, name, adapters.named[name])


def _require_unmerged(model: nn.Module) -> None:
    if state.get(model, Merged) is not None:
        raise AdapterError("an adapter is merged here: call unmerge_adapter(model) first")


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
    for key, base in adapters.base.items():
        if base is None:
            model.get_submodule(key.removesuffix(".bias")).bias = None
        else:
            _tensor(model, key).copy_(base)
    release(adapters)
    adapters.active = None
    adapters.base.clear()


def _activate(model: nn.Module, adapters: Adapters, name: str, contents: Contents) -> None:
    """From the base values to those of ``contents``, which is kept under ``name``.

    Raises: AdapterError, the model at its base and the kept adapters as they were.
    """
    _check_ties(model, contents)
    modules = [model.get_submodule(path) for path in contents.biases]
    try:
        for module, (path, difference) in zip(modules, contents.biases.items(), strict=True):
            key = f"{path}.bias"
            adapters.base[key] = None if module.bias is None else module.bias.detach().clone()
            into = (add_bias(module) if module.bias is None else module.bias).detach()
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
            as_is = torch.zeros_like(value) if name in differences else _tensor(model, name)
            others = [given.get(n) for n in tied]
            same = all(o is not None and torch.equal(o, value) for o in others)
            if not same and not torch.equal(value.to(as_is), as_is):
                other = next(n for n in tied if n != name)
                raise AdapterError(
                    f"the adapter has a value of its own for '{name}', which in this model is tied "
                    f"to '{other}': it comes from a model whose tie was undone; load it with PEFT"
                )
