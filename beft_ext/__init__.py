"""Select and train single bias terms of Hugging Face language models (BEFT, arXiv 2509.15974)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from beft_ext.models import Bias, BiasError, BiasMap, find_biases
    from beft_ext.selection import Selection, SelectionError, select
    from beft_ext.tap import Tap, TapError

_HOMES = {
    "Bias": "models",
    "BiasError": "models",
    "BiasMap": "models",
    "find_biases": "models",
    "Selection": "selection",
    "SelectionError": "selection",
    "select": "selection",
    "Tap": "tap",
    "TapError": "tap",
}

__all__ = [
    "Bias",
    "BiasError",
    "BiasMap",
    "Selection",
    "SelectionError",
    "Tap",
    "TapError",
    "find_biases",
    "select",
]


def __getattr__(name: str) -> Any:
    # Loaded at first use: `import beft_ext` itself costs no import of torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'beft_ext' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"beft_ext.{_HOMES[name]}"), name)
