"""From a model's structure to its projections, and the map of its biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from beft_ext.errors import BeftError
from beft_ext.models.bias_map import TERMS, Bias, BiasError, BiasMap, Projection
from beft_ext.models.registry import (
    ATTENTIONS,
    CROSS,
    ENDINGS,
    EXPERTS,
    FUSED,
    GATE_UP,
    LATENT_QUERIES,
    MODALITIES,
    NO_ATTENTION,
)
from beft_ext.models.wrappers import inside, is_shard

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

QKV = ("query", "key", "value")
Found = list[tuple[str, int, int, int]]  # term, groups, start, stop


def find_biases(model: nn.Module, names: Mapping[str, str] | None = None) -> BiasMap:
    """Find every bias of a model, by layer and term.

    Args:
        model: a transformers encoder, decoder or both, with or without a task head.
        names: describes an architecture that is not known. It maps a term to the ending of the
            projection's module path within a layer, such as
            ``{"query": "att.wq", "value": "att.wv"}``. None for the known architectures.
    Returns:
        The biases that the model has; places without a bias are left out.
    Raises:
        BiasError: no layer, no attention projection or no bias was found, or ``names`` has an
            unknown term. The message says what was found.
    Example:
        >>> import beft_ext
        >>> biases = beft_ext.find_biases(model)
        >>> [bias.name for bias in biases if bias.term == "value"]
        ['0.value', '1.value']
    """
    projections = find_projections(model, names)
    biases = [p.bias for p in projections if p.has_bias]
    if not biases:
        raise BiasError(
            f"{type(model).__name__} has no bias in any projection or norm of its "
            f"{1 + max(p.bias.layer for p in projections)} layers (looked in "
            f"'{projections[0].bias.module}' and on): prepare adds one"
        )
    return BiasMap(_one_a_place(biases))


def find_projections(model: nn.Module, names: Mapping[str, str] | None = None) -> list[Projection]:
    """Every projection and norm of the terms by layer, with or without a bias.

    Args:
        model, names: as for ``find_biases``.
    Raises:
        BiasError: there is none.
    """
    model = inside(model)
    if names is not None and (wrong := [t for t in names if t not in TERMS]):
        raise BiasError(f"unknown term '{wrong[0]}' in names: use {', '.join(TERMS)}")
    parts = _attention_parts(model) if names is None else _named_parts(model, names)
    owner = {id(p): n for n, p in model.named_parameters()}
    found: list[Projection] = []
    for index, prefix in enumerate(_layers(model, parts)):
        for path, module in model.get_submodule(prefix).named_modules():
            where = f"{prefix}.{path}"
            width = output_width(module)
            if width is None or not path:
                continue
            slices = parts.get(where)
            if slices is None and names is None:
                slices = _by_ending(path, width)
            parameter = getattr(module, "bias", None)
            name = f"{where}.bias" if parameter is None else owner[id(parameter)]
            for term, groups, start, stop in slices or ():
                bias = Bias(term, index, where, name, start, stop, groups)
                found.append(Projection(bias, parameter is not None, is_linear(module)))
    if not found:
        raise BiasError(_unknown(model))
    return _numbered(found)


def require_fit(model: nn.Module, biases: Sequence[Bias], error: type[BeftError]) -> None:
    """Raise ``error`` unless each of ``biases`` lies in the model and has a name of its own.

    A part of a parameter must be one that the model is known to have, if any is known: of a bias
    from a narrower model the first elements alone would train.
    """
    sizes = {n: p.numel() for n, p in model.named_parameters(remove_duplicate=False)}
    parts = [b for b in biases if b.start or b.groups * b.stop != sizes.get(b.parameter)]
    known = _slices(model) if parts else {}
    for bias in parts:
        size, part = sizes.get(bias.parameter, 0), (bias.groups, bias.start, bias.stop)
        if bias.groups * bias.stop > size or part not in known.get(bias.parameter, [part]):
            has = f"'{bias.parameter}' of {size} elements" if size else f"no '{bias.parameter}'"
            raise error(
                f"bias '{bias.name}' of {bias.width} elements is of another model, for this one "
                f"has {has}: pass what find_biases gives for this model"
            )
    names = [b.name for b in biases]
    if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
        raise error(f"two biases have the name '{twice}': give each a number of its own")


def output_width(module: nn.Module) -> int | None:
    """H of a linear layer (GPT-2's Conv1D and quantised ones too) or norm that has a place for a
    bias ``(H,)``, filled or not; None for any other module."""
    bias, weight = getattr(module, "bias", None), getattr(module, "weight", None)
    if getattr(weight, "ndim", 0) > 2:
        return None  # a convolution's outputs do not lie along the last axis
    if isinstance(bias, nn.Parameter):
        return bias.numel() if bias.ndim == 1 else None
    if bias is not None or not isinstance(weight, Tensor):
        return None
    width = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return int(width or weight.shape[0]) if width or weight.ndim == 1 else None


def outer_modules(names: Iterable[str]) -> set[str]:
    """Every module that lies above one of the named modules or tensors, the model left out."""
    return {n.rsplit(".", k)[0] for n in names for k in range(1, n.count(".") + 1)}


def is_linear(module: nn.Module) -> bool:
    """False for a norm: its weight is a vector ``(H,)``."""
    return getattr(getattr(module, "weight", None), "ndim", 2) == 2


def is_quantised(tensor: Tensor) -> bool:
    """True for packed integers (bitsandbytes) and for wrappers around them (torchao): frozen
    values, not to be written to or read in place."""
    if is_shard(tensor):
        return False
    return not tensor.is_floating_point() or is_traceable_wrapper_subclass(tensor)


def _attention_parts(model: nn.Module) -> dict[str, Found]:
    """Path of each query, key and value projection, with the terms that it holds."""
    parts: dict[str, Found] = {}
    config = getattr(model, "config", None)
    configs: dict[str, PreTrainedConfig] = {"": config}
    towers: set[str] = set()
    for path, module in model.named_modules():
        above = path.rpartition(".")[0]
        configs[path] = getattr(module, "config", None) or configs.get(above, config)
        if above in towers or _is_tower(configs[path], configs.get(above)):
            towers.add(path)
            continue
        steps = path.split(".")
        if any(step in NO_ATTENTION for step in steps):
            continue
        inside = dict(module.named_children())
        cross = "cross_" if any(step in CROSS for step in steps) else ""
        for names in ATTENTIONS:
            if all(_linear(inside.get(name)) for name in names):
                for term, name in zip(QKV, names, strict=True):
                    child = f"{path}.{name}" + _inner(inside[name])
                    width = output_width(model.get_submodule(child))
                    parts[child] = [(cross + term, 1, 0, width or 0)]
                break
        for name, child_module in inside.items():
            width = output_width(child_module)
            if name in LATENT_QUERIES and width:
                parts[f"{path}.{name}"] = [(cross + LATENT_QUERIES[name], 1, 0, width)]
            elif width and (ending := _fused(f"{path}.{name}")):
                groups, slices = FUSED[ending](configs[path], width)
                parts[f"{path}.{name}"] = [(cross + t, groups, a, b) for t, a, b in slices]
            elif name == "q_proj" and "kv_b_proj" in inside and width:
                parts[f"{path}.{name}"] = [(cross + "query", 1, 0, width)]
    return parts


def _is_tower(own: PreTrainedConfig, above: PreTrainedConfig) -> bool:
    """Whether a module with the config ``own`` sees or hears for the text model beside it: no
    text reaches its biases."""
    if own is above or not any(hasattr(above, f"{kind}_config") for kind in MODALITIES):
        return False
    beside = (v for k, v in vars(above).items() if k.endswith("_config") and k != "text_config")
    return any(getattr(v, "model_type", None) == own.model_type for v in beside)


def _named_parts(model: nn.Module, names: Mapping[str, str]) -> dict[str, Found]:
    parts: dict[str, Found] = {}
    for path, module in model.named_modules():
        width = output_width(module)
        for term, ending in names.items():
            if width and _ends(path, ending):
                parts[path] = [(term, 1, 0, width)]
    return parts


def _by_ending(path: str, width: int) -> Found | None:
    """The terms of an output projection, MLP projection or norm."""
    steps = path.split(".")
    if any(step in EXPERTS for step in steps) or any(step in NO_ATTENTION for step in steps):
        return None
    if any(_ends(path, ending) for ending in GATE_UP):
        return [("mlp_gate", 1, 0, width // 2), ("mlp_up", 1, width // 2, width)]
    matches = [(len(e), t) for t, endings in ENDINGS.items() for e in endings if _ends(path, e)]
    if not matches:
        return None
    term = max(matches)[1]
    crossing = any(path.startswith(c) or f".{c}" in path for c in CROSS)
    if crossing and term.startswith("attention"):
        term = f"cross_{term}"
    return [(term, 1, 0, width)]


def _fused(path: str) -> str | None:
    return max((e for e in FUSED if _ends(path, e)), key=len, default=None)


def _linear(module: nn.Module | None) -> bool:
    return module is not None and bool(output_width(module) or _inner(module))


def _inner(module: nn.Module) -> str:
    """Moshi wraps its linear layers."""
    return ".linear" if isinstance(getattr(module, "linear", None), nn.Linear) else ""


def _layers(model: nn.Module, parts: Mapping[str, Found]) -> list[str]:
    """Paths of the layers: entries of the innermost module lists that hold an attention."""
    layers: list[str] = []
    above = outer_modules(parts)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        paths = [f"{name}.{i}" if name else str(i) for i in range(len(module))]
        holding = [p for p in paths if p in above]
        # T5 keeps the parts of one layer in a list: its attention is one entry, its MLP another.
        pieces = len(holding) < len(module) and any(name.startswith(f"{a}.") for a in layers)
        if not pieces:
            layers += holding
    outer = outer_modules(layers)
    return [a for a in layers if a not in outer]


def _one_a_place(biases: list[Bias]) -> list[Bias]:
    """One entry per parameter and slice: the first of the modules that hold the parameter."""
    first: dict[tuple[str, int], Bias] = {}
    for bias in biases:
        first.setdefault((bias.parameter, bias.start), bias)
    return list(first.values())


def _numbered(found: list[Projection]) -> list[Projection]:
    """With the numbers of a term's places in one layer; a tied one is one place."""
    numbers: dict[tuple[int, str], dict[tuple[str, int], int]] = {}
    numbered = []
    for projection in found:
        bias = projection.bias
        own = numbers.setdefault((bias.layer, bias.term), {})
        number = own.setdefault((bias.parameter, bias.start), len(own))
        numbered.append(replace(projection, bias=replace(bias, number=number)))
    return numbered


def _slices(model: nn.Module) -> dict[str, list[tuple[int, int, int]]]:
    """Groups, start and stop of the known biases by parameter; none of an unknown architecture."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    with suppress(BiasError):
        for bias in (p.bias for p in find_projections(model)):
            found.setdefault(bias.parameter, []).append((bias.groups, bias.start, bias.stop))
    return found


def _ends(path: str, ending: str) -> bool:
    return path == ending or path.endswith("." + ending)


def _unknown(model: nn.Module) -> str:
    lists = [n or "(root)" for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = [n for n, p in model.named_parameters() if n.endswith("bias") and p.ndim == 1]
    return (
        f"{type(model).__name__}: no layer with known query, key and value projections. "
        f"Module lists: {', '.join(lists[:5]) or 'none'}; biases: {', '.join(found[:8])}. "
        "Describe it by the endings of the module names within a layer: "
        "find_biases(model, names={'query': '...', 'key': '...', 'value': '...'})"
    )
