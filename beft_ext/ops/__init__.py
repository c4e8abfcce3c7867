"""The operators, registered with the PyTorch dispatcher under ``torch.ops.beft_ext``."""

from beft_ext.ops import bias_adamw_step as bias_adamw_step  # registers it
from beft_ext.ops.bias_example_grads import bias_example_grads
from beft_ext.ops.bias_grad_stats import bias_grad_stats
from beft_ext.ops.checks import OperatorError
from beft_ext.ops.dispatch import BackendError, backends, set_backend

__all__ = [
    "BackendError",
    "OperatorError",
    "backends",
    "bias_example_grads",
    "bias_grad_stats",
    "set_backend",
]
