"""From a model's structure to its projections, and the map of its biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from beft_ext.models.bias_map import TERMS, Bias, BiasError, BiasMap, Projection
from beft_ext.models.registry import ENDINGS, FUSED

QKV = ("query", "key", "value")


def find_biases(model: nn.Module, names: Mapping[str, str] | None = None) -> BiasMap:
    """Every bias vector of the eight terms, by layer.

    model: a transformers encoder or decoder, with or without a task head.
    names: for an architecture that is not known, term -> ending of the projection's module
        name within a layer, such as ``{"query": "att.wq", "value": "att.wv"}``.
    Raises BiasError where no layer, no attention projection or no bias is found, with what was
    found and how to describe it.
    """
    projections = find_projections(model, names)
    biases = [p.bias for p in projections if p.has_bias]
    if not biases:
        raise BiasError(
            f"{type(model).__name__} has no bias in any projection or norm of its "
            f"{1 + max(p.bias.layer for p in projections)} layers (looked in "
            f"'{projections[0].bias.module}' and on): prepare adds one"
        )
    return BiasMap(_mark_tied(biases))


def find_projections(model: nn.Module, names: Mapping[str, str] | None = None) -> list[Projection]:
    """Every projection and norm of the eight terms by layer, with or without a bias.

    model, names: as in ``find_biases``. Raises BiasError where there is none.
    """
    if names is not None and (wrong := [t for t in names if t not in TERMS]):
        raise BiasError(f"unknown term '{wrong[0]}' in names: use {', '.join(TERMS)}")
    endings = ENDINGS if names is None else {t: (n,) for t, n in names.items()}
    fused = FUSED if names is None else {}
    owner = {id(p): n for n, p in model.named_parameters()}
    layers = _layers(model, endings, fused)
    config = getattr(model, "config", None)
    repeated = len(layers) < (getattr(config, "num_hidden_layers", None) or 0)
    found: list[Projection] = []
    for index, prefix in enumerate(layers):
        for path, module in model.get_submodule(prefix).named_modules():
            ending, term = _match(path, fused), _term(path, endings)
            width = output_width(module)
            if width is None or (ending is None and term is None):
                continue
            parameter = getattr(module, "bias", None)
            where = f"{prefix}.{path}"
            common: dict[str, Any] = {
                "layer": index,
                "module": where,
                "parameter": f"{where}.bias" if parameter is None else owner[id(parameter)],
                "shared": repeated,
            }
            if ending is not None:
                biases = _split(width, fused[ending], config, common)
            else:
                biases = [Bias(term=str(term), start=0, stop=width, **common)]
            found += [Projection(b, parameter is not None, is_linear(module)) for b in biases]
    if not found:
        raise BiasError(_unknown(model))
    return found


def output_width(module: nn.Module) -> int | None:
    """H of a linear layer (GPT-2's Conv1D and quantised ones too) or norm that has a place for a
    bias ``(H,)``, filled or not; None for any other module."""
    bias, weight = getattr(module, "bias", None), getattr(module, "weight", None)
    if isinstance(bias, nn.Parameter):
        return bias.numel() if bias.ndim == 1 else None
    if bias is not None or not isinstance(weight, Tensor):
        return None
    width = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return int(width or weight.shape[0]) if width or weight.ndim == 1 else None


def is_linear(module: nn.Module) -> bool:
    """False for a norm: its weight is a vector ``(H,)``."""
    return getattr(getattr(module, "weight", None), "ndim", 2) == 2


def _layers(
    model: nn.Module, endings: Mapping[str, tuple[str, ...]], fused: Mapping[str, bool]
) -> list[str]:
    """Paths of the layers: entries of the innermost module lists that hold an attention."""
    wanted = [e for t in QKV for e in endings.get(t, ())] or [
        e for v in endings.values() for e in v
    ]
    wanted += fused
    layers: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        holding = [
            f"{name}.{i}" if name else str(i)
            for i, child in enumerate(module)
            if any(_ends(path, e) for path, _ in child.named_modules() for e in wanted)
        ]
        # T5 keeps the parts of one layer in a list: its attention is one entry, its MLP another.
        parts = len(holding) < len(module) and any(name.startswith(f"{a}.") for a in layers)
        layers += [] if parts else holding
    return [a for a in layers if not any(b != a and b.startswith(a + ".") for b in layers)]


def _split(size: int, interleaved: bool, config: Any, common: dict[str, Any]) -> list[Bias]:
    groups = config.num_attention_heads if interleaved else 1
    width = size // (3 * groups)
    return [
        Bias(term=term, start=i * width, stop=(i + 1) * width, groups=groups, **common)
        for i, term in enumerate(QKV)
    ]


def _mark_tied(biases: list[Bias]) -> list[Bias]:
    """One entry per parameter and term; shared where several modules hold the parameter."""
    uses = Counter((b.parameter, b.term) for b in biases)
    return [
        Bias(**{**vars(b), "shared": b.shared or uses[b.parameter, b.term] > 1}) for b in biases
    ]


def _ends(path: str, ending: str) -> bool:
    return path == ending or path.endswith("." + ending)


def _match(path: str, table: Mapping[str, Any]) -> str | None:
    return max((e for e in table if _ends(path, e)), key=len, default=None)


def _term(path: str, endings: Mapping[str, tuple[str, ...]]) -> str | None:
    matches = [(len(e), t) for t, es in endings.items() for e in es if _ends(path, e)]
    return max(matches)[1] if matches else None


def _unknown(model: nn.Module) -> str:
    lists = [n or "(root)" for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = [n for n, p in model.named_parameters() if n.endswith("bias") and p.ndim == 1]
    return (
        f"{type(model).__name__}: no layer with known query, key and value projections. "
        f"Module lists: {', '.join(lists[:5]) or 'none'}; biases: {', '.join(found[:8])}. "
        "Describe it by the endings of the module names within a layer: "
        "find_biases(model, names={'query': '...', 'key': '...', 'value': '...'})"
    )
