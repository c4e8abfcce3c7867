"""Where biases live in a model. Knows no kernel."""

from beft_ext.models.added import Plain, add_bias, make_plain, mergeable, undo_plain
from beft_ext.models.bias_map import TERMS, Bias, BiasError, BiasMap, Projection
from beft_ext.models.find import (
    find_biases,
    find_projections,
    is_linear,
    is_quantised,
    outer_modules,
    output_width,
    require_fit,
)
from beft_ext.models.head import class_names_of, head_parameters, output_layer, unsharded
from beft_ext.models.terms import Selected, parse_terms, pick, spell

__all__ = [
    "TERMS",
    "Bias",
    "BiasError",
    "BiasMap",
    "Plain",
    "Projection",
    "Selected",
    "add_bias",
    "class_names_of",
    "find_biases",
    "find_projections",
    "head_parameters",
    "is_linear",
    "is_quantised",
    "make_plain",
    "mergeable",
    "outer_modules",
    "output_layer",
    "output_width",
    "parse_terms",
    "pick",
    "require_fit",
    "spell",
    "undo_plain",
    "unsharded",
]
