"""What is trained or active on a model, written as an adapter's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext import __version__
from beft_ext.adapters.applying import Adapters
from beft_ext.adapters.card import model_card
from beft_ext.adapters.contents import (
    FILES,
    AdapterError,
    Contents,
    class_facts,
    head_modules,
    head_state,
    model_facts,
    unsupported,
    write,
)
from beft_ext.adapters.hub import Upload
from beft_ext.files import JsonObject
from beft_ext.models import state, wrappers
from beft_ext.selection import Audition, Selection, SelectionError
from beft_ext.training.preparation import Prepared, prepared_of


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    selection: Selection | str | Path | None = None,
    *,
    audition: Audition | None = None,
    about: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    **hub: Any,
) -> str | None:
    """Write the trained biases and head of a prepared model, or its active adapter.

    Biases are written as differences to the base, fp32 (fp64 for an fp64 bias): base plus
    difference is the trained value to the rounding of one addition. What PEFT cannot load
    (LayerNorm, GPT-2's Conv1D) is written in the same way, and the config says so. Weights and
    config carry digests, which ``load_adapter`` checks.

    Args:
        model: a prepared model, or one with an active adapter.
        folder: gets ``adapter_model.safetensors``, ``adapter_config.json`` and ``README.md``, in
            the format of PEFT 0.21.
        selection: a Selection or its ``selection.json``, whose table the README shows; None for a
            README without one.
        audition: the race of terms or rates, whose table the README shows too.
        about: what else the config keeps under ``auto_mapping.beft_ext``, as JSON. The README shows
            ``data``, in words, and ``evaluation``: ``rows`` ("validation", "test") and ``examples``
            of what judged, the metrics ``before`` training and ``after``, and instead of these
            (None) ``best_on_validation`` where the rows chose the epoch; ``majority``, the metrics
            of always saying its ``class``.
        push_to_hub: upload these three files too, as one commit.
        hub: ``repo_id`` (by default the folder's name), ``token``, ``private``,
            ``commit_message``, ``revision`` and ``create_pr``, as in transformers.
    Returns:
        The address of the commit; None without ``push_to_hub``.
    Raises:
        AdapterError: nothing is trained or loaded; a value is not finite; ``selection`` is no
            selection's file; a model that is wrapped by PEFT, or spread over processes; settings
            of the hub without ``push_to_hub``; no token, in which case nothing
            is written; an upload that failed, in which case the folder is whole.
        OSError: the disk is full, or the folder cannot be written to.
    Example:
        >>> import os, beft_ext
        >>> prepared = beft_ext.prepare(model)
        >>> beft_ext.save_adapter(model, "adapter")
        >>> sorted(os.listdir("adapter"))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    model = wrappers.whole(model, AdapterError, lone=True)
    folder, upload = Path(folder), None
    if push_to_hub:
        upload = Upload(**{"repo_id": folder.resolve().name} | hub)
        upload.check()
    elif hub:
        raise AdapterError(f"{next(iter(hub))}=... is for the hub: pass push_to_hub=True with it")
    contents, facts, what = _to_save(model)
    reason = unsupported(model, contents.biases)
    facts = {**(about or {}), "version": __version__, **facts}
    if reason is not None:
        facts["not_in_peft"] = reason
    place = upload.repo_id if upload is not None and "/" in upload.repo_id else None
    try:
        card = model_card(
            model,
            contents,
            what,
            reason,
            place=place,
            selection=selection,
            audition=audition,
            about=about,
        )
    except SelectionError as error:
        raise AdapterError(str(error)) from error
    write(folder, model, contents, facts, card)
    return None if upload is None else upload.send(folder, FILES)


def _to_save(model: nn.Module) -> tuple[Contents, JsonObject, str]:
    """What is trained or active, the facts that its config keeps of it, and its summary."""
    prepared, facts = prepared_of(model), model_facts(model) | class_facts(model)
    if prepared is not None:
        facts["terms"] = list(prepared.terms)
        facts["biases"] = [
            {"module": b.module, "term": b.term, "layer": b.layer}
            | {"start": b.start, "stop": b.stop, "groups": b.groups}
            for b in prepared.biases
        ]
        return _trained(model, prepared), facts, str(prepared)
    adapters = state.get(model, Adapters)
    if adapters is None or adapters.active is None:
        raise AdapterError("nothing to save: the model is not prepared and no adapter is active")
    contents = adapters.named[adapters.active]
    if contents.terms:
        facts["terms"] = list(contents.terms)
    return contents, facts, "\n".join(sorted(contents.biases))


def _trained(model: nn.Module, prepared: Prepared) -> Contents:
    """Differences of the prepared biases over the whole width of every module they belong to."""
    names = [*(b.parameter for b in prepared.biases), *prepared.head]
    wrappers.require_unsharded({n: model.get_parameter(n) for n in names}, AdapterError)
    whole: dict[str, Tensor] = {}
    for bias in prepared.biases:
        parameter = model.get_parameter(bias.parameter).detach()
        difference = bias.read(parameter).double() - prepared.initial[bias.name].to(
            parameter.device, torch.float64
        )
        into = whole.setdefault(bias.parameter, torch.zeros_like(parameter, dtype=torch.float64))
        bias.view(into).copy_(difference.view(bias.groups, -1))
    owner = {id(model.get_parameter(name)): name for name in whole}
    biases = {}
    for path, module in model.named_modules():  # tied projections hold one bias under several
        parameter = getattr(module, "bias", None)
        if isinstance(parameter, Tensor) and id(parameter) in owner:
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            biases[path] = whole[owner[id(parameter)]].to(dtype)
    head = head_modules(model, prepared.head)
    return Contents(biases, head_state(model, head), prepared.terms)
