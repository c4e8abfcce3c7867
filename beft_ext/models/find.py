"""``find_biases``: from a model's structure to the map of its biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from beft_ext.models.bias_map import TERMS, Bias, BiasError, BiasMap
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
    if names is not None and (wrong := [t for t in names if t not in TERMS]):
        raise BiasError(f"unknown term '{wrong[0]}' in names: use {', '.join(TERMS)}")
    endings = ENDINGS if names is None else {t: (n,) for t, n in names.items()}
    fused = FUSED if names is None else {}
    owner = {id(p): n for n, p in model.named_parameters()}
    layers = _layers(model, endings, fused)
    if not layers:
        raise BiasError(_unknown(model))
    config = getattr(model, "config", None)
    repeated = len(layers) < (getattr(config, "num_hidden_layers", None) or 0)
    biases: list[Bias] = []
    for index, prefix in enumerate(layers):
        for path, module in model.get_submodule(prefix).named_modules():
            parameter = getattr(module, "bias", None)
            if not isinstance(parameter, nn.Parameter) or parameter.ndim != 1:
                continue
            common: dict[str, Any] = {
                "layer": index,
                "module": f"{prefix}.{path}",
                "parameter": owner[id(parameter)],
                "shared": repeated,
            }
            if (ending := _match(path, fused)) is not None:
                biases += _split(parameter.numel(), fused[ending], config, common)
            elif (term := _term(path, endings)) is not None:
                biases.append(Bias(term=term, start=0, stop=parameter.numel(), **common))
    if not biases:
        raise BiasError(
            f"{type(model).__name__} has no bias in any projection or norm of its "
            f"{len(layers)} layers (looked in '{layers[0]}')"
        )
    return BiasMap(_mark_tied(biases))


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
        if isinstance(module, nn.ModuleList):
            for i, child in enumerate(module):
                if any(_ends(path, e) for path, _ in child.named_modules() for e in wanted):
                    layers.append(f"{name}.{i}" if name else str(i))
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
