"""Adapters: the trained biases and head as files, on a model by name, and merged for good.

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

from beft_ext.integrations import peft_format
from beft_ext.integrations.hub import Upload
from beft_ext.integrations.model_card import model_card
from beft_ext.integrations.peft_format import AdapterError, Contents, head_classes, model_class
from beft_ext.models import BiasError, Plain, add_bias, make_plain, undo_plain
from beft_ext.preparation import Prepared, mark, prepared_of, unmark
from beft_ext.selection import Selection, SelectionError

__all__ = [
    "AdapterError",
    "head_classes",
    "load_adapter",
    "merge_adapter",
    "model_class",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]


@dataclass
class _Adapters:
    """Kept on a model. base: by tensor name, the value without any adapter; None where there is
    no bias then."""

    named: dict[str, Contents] = field(default_factory=dict)
    base: dict[str, Tensor | None] = field(default_factory=dict)
    active: str | None = None


@dataclass
class _Merged:
    """What ``unmerge_adapter`` needs."""

    plain: Plain
    prepared: Prepared | None
    adapters: _Adapters | None


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    selection: Selection | str | Path | None = None,
    *,
    push_to_hub: bool = False,
    **hub: Any,
) -> str | None:
    """Write the trained biases and head of a prepared model, or its active adapter.

    folder: gets ``adapter_model.safetensors``, ``adapter_config.json`` and ``README.md`` (with
        the table of ``selection``, a Selection or its ``selection.json``), as PEFT 0.21 has them.
    push_to_hub: upload these three files too, as one commit whose address is returned. hub:
        ``repo_id`` (by default the folder's name), ``token``, ``private``, ``commit_message``,
        ``revision`` and ``create_pr``, as in transformers.
    Differences are fp32 (fp64 for an fp64 bias): base + difference is the trained value to the
    rounding of one addition. What PEFT cannot load (LayerNorm, GPT-2's Conv1D) is saved the same
    way, and the config says so. Raises AdapterError where nothing is trained or loaded, a value
    is not finite, or the hub takes no upload; without a token nothing is written.
    """
    folder, upload = Path(folder), None
    if push_to_hub:
        upload = Upload(**{"repo_id": folder.resolve().name} | hub)
        upload.check()
    elif hub:
        raise AdapterError(f"{next(iter(hub))}=... is for the hub: pass push_to_hub=True with it")
    contents, facts, what = _to_save(model)
    reason = peft_format.unsupported(model, contents.biases)
    if reason is not None:
        facts["not_in_peft"] = reason
    try:
        card = model_card(model, what, reason, selection)
    except SelectionError as error:
        raise AdapterError(str(error)) from error
    peft_format.write(folder, model, contents, facts, card)
    return None if upload is None else upload.send(folder, peft_format.FILES)


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
    if "_beft_merged" in model.__dict__:
        raise AdapterError("an adapter is merged here: call unmerge_adapter(model) first")
    contents = peft_format.read(Path(folder), model)
    prepared = prepared_of(model)
    if prepared is not None:
        _continue_from(model, prepared, contents)
        return
    adapters = _adapters(model) or _Adapters()
    _activate(model, adapters, None)
    adapters.named[name] = contents
    for key in _touched(contents):
        if key not in adapters.base:
            tensor = _tensor(model, key)
            adapters.base[key] = None if tensor is None else tensor.clone()
    _activate(model, adapters, name)
    # Past nn.Module's own __setattr__: not part of the model.
    object.__setattr__(model, "_beft_adapters", adapters)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switch to the loaded adapter ``name``, or with None back to the base model, to the bit.

    Raises AdapterError for a name that was not loaded.
    """
    adapters = _adapters(model)
    if "_beft_merged" in model.__dict__:
        raise AdapterError("an adapter is merged here: call unmerge_adapter(model) first")
    if adapters is None or (name is not None and name not in adapters.named):
        loaded = ", ".join(adapters.named) if adapters is not None else ""
        raise AdapterError(f"no adapter '{name}' on this model: loaded are {loaded or 'none'}")
    _activate(model, adapters, name)


def merge_adapter(model: nn.Module) -> None:
    """Make the trained or active adapter part of a plain model, which ``save_pretrained`` writes
    and transformers loads without us.

    Where biases were added, the config's own flag (LLaMA's and Gemma's ``attention_bias``,
    LLaMA's ``mlp_bias``) is set, and the biases that it brings along are zero; GPT-Neo's value
    bias is folded into the output projection. Raises AdapterError for a family that has no such
    place (Mistral, GPT-J, T5), a model merged already, and one without an adapter.
    """
    if "_beft_merged" in model.__dict__:
        raise AdapterError("an adapter is merged here already: unmerge_adapter(model) undoes it")
    prepared, adapters = prepared_of(model), _adapters(model)
    if prepared is not None:
        added = [n.removesuffix(".bias") for n in prepared.added]
    elif adapters is not None and adapters.active is not None:
        biases = adapters.named[adapters.active].biases
        added = [m for m in biases if adapters.base[f"{m}.bias"] is None]
    else:
        raise AdapterError("nothing to merge: neither prepared nor with an active adapter")
    try:
        plain = make_plain(model, added)
    except BiasError as error:
        raise AdapterError(str(error)) from error
    if prepared is not None:
        unmark(model)
    model.__dict__.pop("_beft_adapters", None)
    object.__setattr__(model, "_beft_merged", _Merged(plain, prepared, adapters))


def unmerge_adapter(model: nn.Module) -> None:
    """Undo ``merge_adapter``: prepared again, or the adapter loaded and active, as it was then.

    ``set_adapter(model, None)`` or ``restore`` then leads to the base. Raises AdapterError for
    a model that was not merged.
    """
    merged: _Merged | None = model.__dict__.pop("_beft_merged", None)
    if merged is None:
        raise AdapterError("no adapter is merged here: there is nothing to undo")
    undo_plain(model, merged.plain)
    if merged.prepared is not None:
        mark(model, merged.prepared)
    if merged.adapters is not None:
        object.__setattr__(model, "_beft_adapters", merged.adapters)


def _adapters(model: nn.Module) -> _Adapters | None:
    found: _Adapters | None = model.__dict__.get("_beft_adapters")
    return found


def _to_save(model: nn.Module) -> tuple[Contents, dict[str, Any], str]:
    """What is trained or active, the facts that its config keeps of it, and its summary."""
    prepared, facts = prepared_of(model), peft_format.model_facts(model)
    if prepared is not None:
        facts["terms"] = list(prepared.terms)
        facts["biases"] = [
            {"module": b.module, "term": b.term, "layer": b.layer}
            | {"start": b.start, "stop": b.stop, "groups": b.groups}
            for b in prepared.biases
        ]
        return _trained(model, prepared), facts, str(prepared)
    adapters = _adapters(model)
    if adapters is None or adapters.active is None:
        raise AdapterError("nothing to save: the model is not prepared and no adapter is active")
    contents = adapters.named[adapters.active]
    return contents, facts, "\n".join(sorted(contents.biases))


def _trained(model: nn.Module, prepared: Prepared) -> Contents:
    """Differences of the prepared biases over the whole width of every module they belong to."""
    whole: dict[str, Tensor] = {}
    for bias in prepared.biases:
        parameter = model.get_parameter(bias.parameter).detach()
        difference = bias.read(parameter).double() - prepared.initial[bias.name].to(
            parameter.device, torch.float64
        )
        into = whole.setdefault(bias.parameter, torch.zeros_like(parameter, dtype=torch.float64))
        bias.view(into).copy_(difference.view(bias.groups, -1))
    biases = {}
    for name, difference in whole.items():
        parameter = model.get_parameter(name)
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        for path, module in model.named_modules():
            if getattr(module, "bias", None) is parameter:
                biases[path] = difference.to(dtype)
    head = peft_format.head_modules(model, prepared.head)
    return Contents(biases, peft_format.head_state(model, head))


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
    inside = tuple(f"{m}." for m in peft_format.head_modules(model, prepared.head))
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


def _activate(model: nn.Module, adapters: _Adapters, name: str | None) -> None:
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
