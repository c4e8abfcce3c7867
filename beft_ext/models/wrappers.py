"""The model inside of what others wrap around it, and what cannot be worked on at all.

Names, classes, heads and records are those of the model inside. A wrapper that spreads the
parameters over processes is refused: its parts are not the values that they seem.
"""

from __future__ import annotations

from torch import nn

from beft_ext.errors import BeftError
from beft_ext.models.offload import has_place


def inside(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile, DataParallel, DDP and sentence-transformers."""
    return _layers(model)[-1]


def whole(
    model: nn.Module,
    error: type[BeftError],
    *,
    adapted: bool = False,
    copies: bool = True,
    replicas: bool = False,
) -> nn.Module:
    """The model inside, where all of it is this process's; Accelerate may offload parts of it.

    adapted: whether PEFT's wrapper will do, where names do not matter.
    copies: whether DataParallel will do, which runs copies of the model.
    replicas: whether DDP will do, where each process holds the whole model.
    Raises ``error`` under DDP, FSDP, tensor parallelism, and where parameters on the meta device
    have no value anywhere.
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
    return layers[-1]


def replicated(model: nn.Module) -> bool:
    """Whether DDP wraps the model: each process holds one, and all of them train together."""
    return any(_replica(layer) for layer in _layers(model))


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
    return str(named or type(model).__name__)


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
    if _from(model, "torch.distributed.fsdp") or hasattr(model, "_get_fsdp_state"):
        return "this model is sharded by FSDP"
    if getattr(model, "_tp_size", None) not in (None, 1):
        return "this model is split by tensor parallelism"
    for name, parameter in model.named_parameters():
        if type(parameter.data).__module__.startswith("torch.distributed"):
            return f"parameter '{name}' is sharded over processes"
        if hasattr(parameter, "ds_status"):
            return f"parameter '{name}' is partitioned by DeepSpeed (ZeRO-3)"
        if parameter.is_meta and not has_place(model, name):
            return f"parameter '{name}' is on the meta device, and no offload holds its value"
    return None


def _from(model: nn.Module, package: str) -> bool:
    """Whether the class of ``model`` or one that it inherits from is of ``package``."""
    return any(
        c.__module__.split(".")[: package.count(".") + 1] == package.split(".")
        for c in type(model).__mro__
    )
