"""Where biases live in a model. Knows no kernel."""

from beft_ext.models.bias_map import TERMS, Bias, BiasError, BiasMap
from beft_ext.models.find import find_biases

__all__ = ["TERMS", "Bias", "BiasError", "BiasMap", "find_biases"]
