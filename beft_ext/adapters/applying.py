"""Adapters on a model: loaded, switched, and told apart from the base values.

A loaded adapter lives in the model's own parameters: no hook, no wrapper, no second model. What
is kept beside them, on the model but out of its ``state_dict``, is each adapter's differences and
the base values of what they change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.adapters.contents import AdapterError, Contents, head_modules, read
from beft_ext.models import Plain, add_bias, state
from beft_ext.training.preparation import Prepared, prepared_of


@dataclass
class Adapters(state.Record):
    """Kept on a model. base: by tensor name, the value without any adapter; None where there is
    no bias then."""

    named: dict[str, Contents] = field(default_factory=dict)
    base: dict[str, Tensor | None] = field(default_factory=dict)
    active: str | None = None

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

    On a model that is not prepared: kept under ``name`` (in place of one of that name), and base
    + difference becomes the value of each bias, in the bias's dtype; projections without a bias
    get one as long as the adapter is active. On a prepared model: training goes on from the
    adapter, which must lie within what was prepared.
    Raises AdapterError for an adapter of another architecture, width or layer count, and for
    files that are damaged or unsafe (a pickle, NaN, a link out of the folder); the model is as
    it was before.
    """
    if not isinstance(name, str) or not name:
        raise AdapterError("an adapter's name is a string that is not empty")
    _require_unmerged(model)
    contents = read(Path(folder), model)
    prepared = prepared_of(model)
    if prepared is not None:
        _continue_from(model, prepared, contents)
        return
    adapters = state.get(model, Adapters) or Adapters()
    _activate(model, adapters, None)
    adapters.named[name] = contents
    for key in _touched(contents):
        if key not in adapters.base:
            tensor = _tensor(model, key)
            adapters.base[key] = None if tensor is None else tensor.clone()
    _activate(model, adapters, name)
    state.put(model, adapters)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switch to the loaded adapter ``name``, or with None back to the base model, to the bit.

    Raises AdapterError for a name that was not loaded.
    """
    adapters = state.get(model, Adapters)
    _require_unmerged(model)
    if adapters is None or (name is not None and name not in adapters.named):
        loaded = ", ".join(adapters.named) if adapters is not None else ""
        raise AdapterError(f"no adapter '{name}' on this model: loaded are {loaded or 'none'}")
    _activate(model, adapters, name)


def _require_unmerged(model: nn.Module) -> None:
    if state.get(model, Merged) is not None:
        raise AdapterError("an adapter is merged here: call unmerge_adapter(model) first")


def _continue_from(model: nn.Module, prepared: Prepared, contents: Contents) -> None:
    """Set the prepared biases and head to the adapter's; all is checked before."""
    left = {m: t.clone() for m, t in contents.biases.items()}
    values: list[tuple[Tensor, Tensor]] = []
    for bias in prepared.biases:
        into = bias.view(model.get_parameter(bias.parameter).detach())
        value = prepared.initial[bias.name].double().view(into.shape)
        if bias.module in left:
            difference = bias.view(left[bias.module])
            value = value + difference.to(value.device, torch.float64)
            difference.zero_()
        values.append((into, value))
    if more := [m for m, t in left.items() if bool(t.any())]:
        raise AdapterError(
            f"the adapter changes '{more[0]}' beyond the prepared biases: prepare its terms too"
        )
    inside = tuple(f"{m}." for m in head_modules(model, prepared.head))
    for name, value in contents.head.items():
        if not inside or not name.startswith(inside):
            raise AdapterError(f"the adapter changes '{name}', which is not in the prepared head")
        values.append((_tensor(model, name), value))
    with torch.no_grad():
        for into, value in values:
            into.copy_(value)


def _tensor(model: nn.Module, name: str) -> Any:
    """A parameter or buffer, sharing its memory; None for a bias that is not there."""
    module, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(module), leaf)
    return None if tensor is None else tensor.detach()


def _touched(contents: Contents) -> list[str]:
    return [f"{m}.bias" for m in contents.biases] + list(contents.head)


def _activate(model: nn.Module, adapters: Adapters, name: str | None) -> None:
    """Back to the base values, then on to those of ``name``."""
    with torch.no_grad():
        if adapters.active is not None:
            for key in _touched(adapters.named[adapters.active]):
                base = adapters.base[key]
                if base is None:
                    model.get_submodule(key.removesuffix(".bias")).bias = None
                else:
                    _tensor(model, key).copy_(base)
        adapters.active = name
        if name is None:
            return
        for path, difference in adapters.named[name].biases.items():
            base = adapters.base[f"{path}.bias"]
            if base is None:
                add_bias(model.get_submodule(path)).requires_grad_(False)
            into = _tensor(model, f"{path}.bias")
            start = torch.zeros_like(into) if base is None else base.to(into.device)
            into.copy_(start.double() + difference.to(into.device, torch.float64))
        for key, value in adapters.named[name].head.items():
            _tensor(model, key).copy_(value)
