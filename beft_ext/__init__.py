"""Select and train single bias terms of Hugging Face language models (BEFT, arXiv 2509.15974)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from beft_ext.adapters import (
        AdapterError,
        load_adapter,
        merge_adapter,
        save_adapter,
        set_adapter,
        unmerge_adapter,
    )
    from beft_ext.models import Bias, BiasError, BiasMap, find_biases
    from beft_ext.optim import BiasAdamW, BiasScore, OptimizerError
    from beft_ext.preparation import Prepared, PrepareError, prepare, restore
    from beft_ext.selection import ProbeError, Selection, SelectionError, select
    from beft_ext.tap import Tap, TapError
    from beft_ext.tuning import Recipe, TuningError, tune

_HOMES = {
    "Bias": "models",
    "BiasError": "models",
    "BiasMap": "models",
    "find_biases": "models",
    "ProbeError": "selection",
    "Selection": "selection",
    "SelectionError": "selection",
    "select": "selection",
    "Tap": "tap",
    "TapError": "tap",
    "AdapterError": "adapters",
    "load_adapter": "adapters",
    "merge_adapter": "adapters",
    "save_adapter": "adapters",
    "set_adapter": "adapters",
    "unmerge_adapter": "adapters",
    "BiasAdamW": "optim",
    "BiasScore": "optim",
    "OptimizerError": "optim",
    "PrepareError": "preparation",
    "Prepared": "preparation",
    "prepare": "preparation",
    "restore": "preparation",
    "Recipe": "tuning",
    "TuningError": "tuning",
    "tune": "tuning",
}

__all__ = [
    "AdapterError",
    "Bias",
    "BiasAdamW",
    "BiasError",
    "BiasMap",
    "BiasScore",
    "OptimizerError",
    "PrepareError",
    "Prepared",
    "ProbeError",
    "Recipe",
    "Selection",
    "SelectionError",
    "Tap",
    "TapError",
    "TuningError",
    "find_biases",
    "load_adapter",
    "merge_adapter",
    "prepare",
    "restore",
    "save_adapter",
    "select",
    "set_adapter",
    "tune",
    "unmerge_adapter",
]


def __getattr__(name: str) -> Any:
    # Loaded at first use: `import beft_ext` itself costs no import of torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'beft_ext' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"beft_ext.{_HOMES[name]}"), name)
