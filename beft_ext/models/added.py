"""Biases that a model's class does not have: adding them, and a place for them in a plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor, nn

from beft_ext.models import offload
from beft_ext.models.bias_map import BiasError
from beft_ext.models.find import is_quantised, output_width
from beft_ext.models.registry import VALUE_FOLDS
from beft_ext.models.wrappers import class_of, is_shard, require_unsharded


def add_bias(model: nn.Module, path: str) -> nn.Parameter:
    """Give a bias-free linear layer a bias of zeros ``(H,)`` where its weight is used, in the
    weight's dtype, or the model's where that is no float type (quantised weights)."""
    module = model.get_submodule(path)
    width, weight = output_width(module), module.weight
    assert width is not None and isinstance(weight, Tensor)
    dtypes = (p.dtype for p in (weight, *model.parameters()) if p.is_floating_point())
    dtype = next(dtypes, torch.get_default_dtype())
    device = offload.place_of(model, f"{path}.weight")
    module.bias = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))
    offload.keep(model, f"{path}.bias")
    return module.bias


@dataclass
class Plain:
    """What ``make_plain`` changed, for ``undo_plain``: flags of the config, biases by module,
    values ``(H,)`` of the output biases that took in a value bias."""

    flags: dict[str, object] = field(default_factory=dict)
    biases: dict[str, nn.Parameter | None] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


def make_plain(model: nn.Module, added: Sequence[str]) -> Plain:
    """Change the config, and what else must change, so that the model's own class has a bias in
    each module of ``added``; the model computes the same.

    Raises BiasError, nothing changed, where the class has no such place.
    """
    plain = Plain()
    if not added or not hasattr(model, "config"):
        return plain
    flags, names = _flags(model, added)
    outputs = (_output(model, path) for path in added if f"{path}.bias" not in names)
    require_unsharded({f"{o}.bias": model.get_parameter(f"{o}.bias") for o in outputs}, BiasError)
    for flag in flags:
        plain.flags[flag] = getattr(model.config, flag)
        setattr(model.config, flag, True)
    for path, module in model.named_modules():
        if f"{path}.bias" in names and output_width(module) and module.bias is None:
            plain.biases[path] = None
            add_bias(model, path).requires_grad_(module.weight.requires_grad)
    for path in added:
        if f"{path}.bias" not in names:
            _fold(model, path, plain)
    return plain


def undo_plain(model: nn.Module, plain: Plain) -> None:
    """Put back what ``make_plain`` changed, parameters as the objects that they were."""
    for flag, value in plain.flags.items():
        setattr(model.config, flag, value)
    for path, parameter in plain.biases.items():
        model.get_submodule(path).bias = parameter
    with torch.no_grad():
        for path, value in plain.values.items():
            model.get_parameter(f"{path}.bias").copy_(value)


def mergeable(model: nn.Module, added: Mapping[str, Sequence[str]]) -> set[str]:
    """The keys of ``added`` for whose modules ``make_plain`` finds a place."""
    classes = [names for _, names in _classes(model)]
    return {k for k, modules in added.items() if any(_holds(model, n, modules) for n in classes)}


def _flags(model: nn.Module, added: Sequence[str]) -> tuple[tuple[str, ...], set[str]]:
    """The fewest flags with which the model's class has the added biases, and its parameters."""
    for flags, names in _classes(model):
        if _holds(model, names, added):
            return flags, names
    raise BiasError(
        f"{type(model).__name__} cannot be saved with a bias in '{added[0]}': its config has no "
        "flag that gives this projection one; keep the adapter beside the model (save_adapter)"
    )


def _classes(model: nn.Module) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Flags that give the model's class more biases and nothing else, the fewest first, and its
    parameters then."""
    known = [k for k, v in vars(model.config).items() if v is False and k.endswith("bias")]
    for count in range(len(known) + 1):
        for flags in combinations(known, count):
            names = _names(model, flags)
            if _lacks_only_biases(model, names):
                yield flags, names


def _holds(model: nn.Module, names: set[str], added: Sequence[str]) -> bool:
    """Whether a class with these parameters has a place for the bias of each module."""
    return all(f"{module}.bias" in names or _output(model, module) for module in added)


def _names(model: nn.Module, flags: Iterable[str]) -> set[str]:
    """Parameters of a model of the same class with these flags set, built without memory."""
    config = copy.deepcopy(model.config)
    for flag in flags:
        setattr(config, flag, True)
    with torch.device("meta"):
        fresh = class_of(model)(config)
    return {n for n, _ in fresh.named_parameters(remove_duplicate=False)}


def _lacks_only_biases(model: nn.Module, names: set[str]) -> bool:
    """True where all that the model lacks of ``names`` are biases of its linear layers."""
    modules = dict(model.named_modules())
    own = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    lacking = (n.rpartition(".") for n in names - own)
    return all(e == "bias" and getattr(modules.get(m), "bias", 0) is None for m, _, e in lacking)


def _output(model: nn.Module, value: str) -> str | None:
    """The output projection that can take in the bias of the value projection, if any."""
    for ending, name in VALUE_FOLDS.items():
        if value.endswith("." + ending):
            output = f"{value.rpartition('.')[0]}.{name}"
            return output if model.get_submodule(output).bias is not None else None
    return None


def _fold(model: nn.Module, value: str, plain: Plain) -> None:
    """``b_o + W_o b_v``: rows of the attention sum to one (docs/definitions.md)."""
    path = _output(model, value)
    assert path is not None
    offload.take(model, [f"{path}.bias"])
    source, output = model.get_submodule(value), model.get_submodule(path)
    plain.biases[value], plain.values[path] = source.bias, output.bias.detach().clone()
    with torch.no_grad():
        if is_quantised(output.weight):  # only the layer itself knows the product
            constant = output(source.bias[None])[0].double() - output.bias.double()
        else:
            weight = offload.value_of(model, f"{path}.weight")
            weight = weight.full_tensor() if is_shard(weight) else weight
            constant = weight.double() @ source.bias.double()
        output.bias.copy_(output.bias.double() + constant)
    source.bias = None
