"""Where biases live in a model. Knows no kernel."""

from beft_ext.models.added import Plain, add_bias, make_plain, undo_plain
from beft_ext.models.bias_map import TERMS, Bias, BiasError, BiasMap, Projection
from beft_ext.models.find import (
    find_biases,
    find_projections,
    is_linear,
    is_quantised,
    outer_modules,
    output_width,
)
from beft_ext.models.head import head_parameters

__all__ = [
    "TERMS",
    "Bias",
    "BiasError",
    "BiasMap",
    "Plain",
    "Projection",
    "add_bias",
    "find_biases",
    "find_projections",
    "head_parameters",
    "is_linear",
    "is_quantised",
    "make_plain",
    "outer_modules",
    "output_width",
    "undo_plain",
]
