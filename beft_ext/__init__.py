"""Select and train single bias terms of Hugging Face language models (BEFT, arXiv 2509.15974)."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers; `X as X` marks a name as exported
    from beft_ext.adapters import (
        AdapterError as AdapterError,
        delete_adapter as delete_adapter,
        load_adapter as load_adapter,
        merge_adapter as merge_adapter,
        save_adapter as save_adapter,
        set_adapter as set_adapter,
        unmerge_adapter as unmerge_adapter,
    )
    from beft_ext.gains import GainError as GainError
    from beft_ext.models import (
        Bias as Bias,
        BiasError as BiasError,
        BiasMap as BiasMap,
        find_biases as find_biases,
    )
    from beft_ext.selection import (
        Gains as Gains,
        ProbeError as ProbeError,
        Selection as Selection,
        SelectionError as SelectionError,
        measure_gains as measure_gains,
        select as select,
    )
    from beft_ext.tap import (
        Tap as Tap,
        TapError as TapError,
    )
    from beft_ext.training.optim import (
        BiasAdamW as BiasAdamW,
        BiasScore as BiasScore,
        OptimizerError as OptimizerError,
    )
    from beft_ext.training.preparation import (
        Prepared as Prepared,
        PrepareError as PrepareError,
        prepare as prepare,
        restore as restore,
    )
    from beft_ext.training.recipe import Recipe as Recipe
    from beft_ext.training.tuning import (
        TuningError as TuningError,
        tune as tune,
    )

_HOMES = {
    "Bias": "models",
    "BiasError": "models",
    "BiasMap": "models",
    "find_biases": "models",
    "GainError": "gains",
    "Gains": "selection",
    "ProbeError": "selection",
    "Selection": "selection",
    "SelectionError": "selection",
    "measure_gains": "selection",
    "select": "selection",
    "Tap": "tap",
    "TapError": "tap",
    "AdapterError": "adapters",
    "delete_adapter": "adapters",
    "load_adapter": "adapters",
    "merge_adapter": "adapters",
    "save_adapter": "adapters",
    "set_adapter": "adapters",
    "unmerge_adapter": "adapters",
    "BiasAdamW": "training.optim",
    "BiasScore": "training.optim",
    "OptimizerError": "training.optim",
    "PrepareError": "training.preparation",
    "Prepared": "training.preparation",
    "prepare": "training.preparation",
    "restore": "training.preparation",
    "Recipe": "training.recipe",
    "TuningError": "training.tuning",
    "tune": "training.tuning",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    # Loaded at first use: `import beft_ext` itself costs no import of torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'beft_ext' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"beft_ext.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
