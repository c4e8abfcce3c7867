"""What an operator verifies before a kernel reads or writes through raw addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from beft_ext.errors import BeftError

# The dtypes that the kernels read, by their number in csrc/cpu/convert.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class OperatorError(BeftError, ValueError):
    """Arguments of an operator that do not fit together."""


def require(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise OperatorError unless ``tensor`` is plain memory of this shape, dtype and device."""
    if (
        tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.device == device
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    ):
        return
    raise OperatorError(
        f"{name} must be a contiguous {dtype} tensor of shape {tuple(shape)} on {device}, "
        f"but is {described(tensor)}"
    )


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the bytes from the first to the last element of two tensors meet."""
    if not torch._C._overlaps(one, other):  # of one storage
        return False
    (begin, end), (other_begin, other_end) = _span(one), _span(other)
    return begin < other_end and other_begin < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor lies within; (0, 0) for one without elements."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin, size = tensor.storage_offset(), tensor.itemsize
    return begin * size, (begin + last + 1) * size


def described(tensor: Tensor) -> str:
    """dtype, shape, device, and what else sets a tensor apart from plain memory, for people."""
    said = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
    if tensor.layout is not torch.strided:
        return f"{said}, {tensor.layout}"
    if tensor.is_neg():
        return f"{said}, with the negative bit: call resolve_neg() on it"
    return said if tensor.is_contiguous() else f"{said}, not contiguous"


def require_memory(*tensors: Tensor) -> None:
    """Raise OperatorError for a tensor that has elements but no memory."""
    for tensor in tensors:
        if tensor.data_ptr() == 0 and tensor.numel() > 0:
            raise OperatorError(
                f"a tensor of shape {tuple(tensor.shape)} has no memory: its storage was freed, or "
                "it is a zero tensor that autograd never filled"
            )
