"""The model inside of what others wrap around it, and what cannot be worked on at all.

Names, classes, heads and records are those of the model inside. ``fully_shard`` wraps nothing: it
changes the class of a model and what its parameters are. What else spreads the parameters over
processes is refused: its parts are not the values that they seem.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.models.offload import has_place

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def inside(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, DataParallel, DDP and sentence-transformers."""
    return _layers(model)[-1]


def beside(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a wrapper has around the model inside, as a Dense module of
    sentence-transformers does."""
    own = {id(p) for p in inside(model).parameters()}
    return [p for p in model.parameters() if id(p) not in own]


def whole(
    model: nn.Module,
    error: type[BeftError],
    *,
    adapted: bool = False,
    copies: bool = True,
    replicas: bool = False,
    lone: bool = False,
) -> nn.Module:
    """The model inside, where all of it is this process's; Accelerate may offload parts of it.

    adapted: whether PEFT's wrapper will do, where names do not matter.
    copies: whether DataParallel will do, which runs copies of the model.
    replicas: whether DDP will do, where each process holds the whole model.
    lone: whether one process may ask without the others.
    A model under ``fully_shard`` will do. Its parameters are shards afterwards, as between steps;
    not where a process is alone, for the next forward must find the same on all.
    Raises ``error`` under DDP, FSDP1, tensor parallelism, ZeRO-3, and where parameters on the meta
    device have no value anywhere.
    """
    layers = _layers(model)
    plain = [layer for layer in layers if not (replicas and _replica(layer))]
    found = next((why for layer in reversed(plain) if (why := _spread(layer)) is not None), None)
    if not adapted and _from(layers[-1], "peft"):
        found = found or (
            "this model is wrapped by PEFT (its merge_and_unload() gives the model inside)"
        )
    if not copies and any(isinstance(layer, nn.DataParallel) for layer in layers):
        found = found or "this model is wrapped in DataParallel, which runs copies of it"
    if found is not None:
        raise error(f"{found}: pass the plain model, in one process and on its devices")
    if not lone:
        reshard(layers[-1])
    return layers[-1]


def replicated(model: nn.Module) -> bool:
    """Whether DDP wraps the model: each process holds one, and all of them train together."""
    return any(_replica(layer) for layer in _layers(model))


def sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) spread the model over processes: each forward and each
    backward takes all of them."""
    return bool(_shards(inside(model)))


def joint(model: nn.Module) -> bool:
    """Whether a call with this model is one of all processes: it is sharded, or in DDP."""
    return replicated(model) or sharded(model)


def is_shard(tensor: Tensor) -> bool:
    """Whether this is a process's part of a larger tensor (torch's DTensor)."""
    return type(tensor).__module__.startswith("torch.distributed")


def require_unsharded(tensors: Mapping[str, Tensor], error: type[BeftError]) -> None:
    """Raise ``error`` where one of these tensors, by name, is a shard."""
    if name := next((n for n, t in tensors.items() if is_shard(t)), None):
        raise error(
            f"'{name}' is sharded, and what trains or loads must be whole in each process: shard "
            "with ignored_params=beft_ext.models.unsharded(model)"
        )


def reshard(model: nn.Module) -> None:
    """The parameters of a sharded model are shards again; its outermost module keeps whole ones
    after a forward. All processes do it, or none; none waits for another."""
    for shard in _shards(inside(model)):
        shard.reshard()


def recover(model: nn.Module) -> None:
    """After an error within a forward or backward: a sharded model may run again."""
    for shard in _shards(inside(model)):
        if hasattr(shard, "reset_iter_state"):  # not before torch 2.13
            with suppress(RuntimeError):  # for it is not the outermost
                shard.reset_iter_state()
    reshard(model)


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class that a model has, or had before ``fully_shard`` put its own in front."""
    kinds = type(model).__mro__
    at = next((i for i, kind in enumerate(kinds) if kind.__name__ == "FSDPModule"), -1)
    found: type[nn.Module] = kinds[at + 1]
    return found


def _shards(model: nn.Module) -> list[FSDPModule]:
    """The modules that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def _replica(layer: nn.Module) -> bool:
    return isinstance(layer, nn.parallel.DistributedDataParallel)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps, from the outermost in."""
    layers = [model]
    while True:
        model = layers[-1]
        if "_orig_mod" in model._modules:  # torch.compile, told without importing its compiler
            layers.append(model.get_submodule("_orig_mod"))
        elif isinstance(model, nn.DataParallel) or _replica(model):
            layers.append(model.module)
        elif (held := _of_sentences(model)) is not None:
            layers.append(held)
        else:
            return layers


def name_of(model: nn.Module) -> str:
    """Name or folder of the model inside, as its config has it; else its class."""
    model = inside(model)
    named = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(named or class_of(model).__name__)


def called(model: nn.Module) -> nn.Module:
    """What takes a transformers model's arguments: the model itself, or that of
    sentence-transformers, whose own call takes a dict of features."""
    held = _of_sentences(model)
    return model if held is None else held


def _of_sentences(model: nn.Module) -> nn.Module | None:
    """The transformers model of sentence-transformers' SentenceTransformer or CrossEncoder."""
    if not _from(model, "sentence_transformers"):
        return None
    first = model[0] if isinstance(model, nn.Sequential) and len(model) else model
    held = getattr(first, "auto_model", getattr(first, "model", None))
    return held if isinstance(held, nn.Module) else None


def _spread(model: nn.Module) -> str | None:
    if _replica(model):
        return "this model is wrapped in DistributedDataParallel"
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        return "this model is wrapped in FullyShardedDataParallel (FSDP1; fully_shard will do)"
    if getattr(model, "_tp_size", None) not in (None, 1):
        return "this model is split by tensor parallelism"
    fully = bool(_shards(model))
    for name, parameter in model.named_parameters():
        if is_shard(parameter) and not (fully and _along_one_axis(parameter)):
            return f"parameter '{name}' is split by tensor parallelism"
        if hasattr(parameter, "ds_status"):
            return f"parameter '{name}' is partitioned by DeepSpeed (ZeRO-3)"
        if parameter.is_meta and not has_place(model, name):
            return f"parameter '{name}' is on the meta device, and no offload holds its value"
    return None


def _along_one_axis(shard: Tensor) -> bool:
    """As ``fully_shard`` leaves it; a second axis is tensor parallelism's."""
    placements = cast("DTensor", shard).placements
    return sum(not placement.is_replicate() for placement in placements) < 2


def _from(model: nn.Module, package: str) -> bool:
    """Whether the class of ``model`` or one that it inherits from is of ``package``."""
    return any(
        c.__module__.split(".")[: package.count(".") + 1] == package.split(".")
        for c in type(model).__mro__
    )
