"""Where biases live in a model. Knows no kernel."""

from beft_ext.models.bias_map import TERMS, Bias, BiasError, BiasMap, Projection
from beft_ext.models.find import find_biases, find_projections, output_width
from beft_ext.models.head import head_parameters

__all__ = [
    "TERMS",
    "Bias",
    "BiasError",
    "BiasMap",
    "Projection",
    "find_biases",
    "find_projections",
    "head_parameters",
    "output_width",
]
