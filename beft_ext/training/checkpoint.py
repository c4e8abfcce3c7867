"""A checkpoint of ``tune``, and what a run is: by which it is known again when it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from beft_ext.files import JsonObject, digest
from beft_ext.models.offload import Values
from beft_ext.models.wrappers import class_of
from beft_ext.ops import dispatch
from beft_ext.training.data import digest_of
from beft_ext.training.preparation import prepared_of
from beft_ext.training.recipe import TuningError


def model_digest(model: nn.Module, trained: Mapping[str, Tensor]) -> str:
    """Digest of what does not train (class, config, frozen values) and of initial values."""
    as_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    facts = dict(as_dict())
    # A moved folder is the same model; the type of problem is set by the first forward.
    for key in ("_name_or_path", "transformers_version", "problem_type"):
        facts.pop(key, None)
    text = json.dumps([class_of(model).__name__, facts], sort_keys=True, default=str)
    frozen = Values(model, (n for n, _ in model.named_parameters() if n not in trained))
    initial: dict[str, Tensor] = {}
    prepared = prepared_of(model)
    if prepared is not None:
        initial |= {f"initial/{n}": t for n, t in prepared.initial.items()}
        initial |= {f"initial/{n}": t for n, t in prepared.head_initial.items()}
    return digest_of(initial, digest_of(frozen, text))


def machine(device: torch.device, ranks: int) -> JsonObject:
    """What must be the same for a resumed run to end in the same bits."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": dispatch.choose(device),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "ranks": ranks,
    }


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], JsonObject, JsonObject, JsonObject]:
    """Tensors, run, machine and progress of a checkpoint whose bytes are those that were saved."""
    from safetensors import SafetensorError, safe_open

    try:
        if digest(path, TuningError) is None:
            raise ValueError("it carries no digest")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        run, where, progress = (json.loads(metadata[k]) for k in ("run", "machine", "progress"))
        return tensors, run, where, progress
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise TuningError(f"{path} is no checkpoint of tune ({error}): start anew") from error
