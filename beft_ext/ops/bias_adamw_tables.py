"""The arguments of ``bias_adamw_step``, and where the tensors among them lie."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from beft_ext.ops import dispatch
from beft_ext.ops.checks import DTYPE_CODES

BLOCK = 1024  # elements of one entry of ``blocks`` at most


class AdamWTables(NamedTuple):
    """All that one step reads and writes, on one device; the operator's arguments in order.

    Args:
        params: fp32, bf16 or fp16 (fp64 beside an fp64 state: reference backend), updated.
        grads: one a parameter, contiguous, of its dtype and size. None leaves the parameter
            alone and does not count the step.
        state: fp32 rows ``exp_avg``, ``exp_avg_sq``, ``initial`` over all elements, updated. A
            fourth row holds the fp32 master copies where a parameter is half precision. A master
            that does not round to its parameter is out of date: the parameter holds.
        steps: fp32, how many steps each tensor has taken, updated.
        scores: fp32, written for segments that have a gradient. With ``d = b - b0``:
            ``sum |d|``, ``<d, b0>``, ``<d, b>``, and ``|g|^2`` unscaled and before clipping.
        blocks: int64, the unit of work, at most ``BLOCK`` elements: tensor, segment, offsets
            into parameter, gradient and flat state, length. Those of a segment are consecutive.
        first_blocks: int64, the first block of each segment, and the number of blocks.
        group_of: the parameter group of each tensor.
        groups: six numbers a group: lr, beta1, beta2, eps, weight decay; -1 to maximise or 1.
        lr: fp32, the groups' rates in place of their own numbers; a CUDA graph reads it anew.
        max_grad_norm: clips the global norm of the gradients; 0 for no clipping.
        grad_scale: fp32 scalar that the gradients are divided by.
        found_inf: fp32 scalar; where it is not zero nothing is updated.
        workspace: fp32 scratch, zero before the first call.
        global_norm: fp32 scalar to clip by, where other devices hold gradients too.
    Shape:
        state ``(3 or 4, N)``, steps ``(tensors,)``, scores ``(segments, 4)``, blocks
        ``(blocks, 6)``, first_blocks ``(segments + 1,)``, lr ``(groups,)``, workspace
        ``(workspace_size(blocks, segments),)``.
    """

    params: list[Tensor]
    grads: Sequence[Tensor | None]
    state: Tensor
    steps: Tensor
    scores: Tensor
    blocks: Tensor
    first_blocks: Tensor
    group_of: Sequence[int]
    groups: Sequence[float]
    lr: Tensor | None
    max_grad_norm: float
    grad_scale: Tensor | None
    found_inf: Tensor | None
    workspace: Tensor
    global_norm: Tensor | None = None


Held = TypeVar("Held", bound="Tensor | None")


class Located(list[Held]):
    """Tensors, or None, with the addresses at which they lie (eight bytes each, 0 for None) and,
    for parameters, what else the kernels are told of each. To ask torch costs as much as the
    kernel's work, so it is asked once."""

    __slots__ = ("addresses", "forms")

    def __init__(
        self,
        tensors: Sequence[Held],
        addresses: bytes | None = None,
        forms: bytes = b"",
    ) -> None:
        super().__init__(tensors)
        self.addresses = packed_addresses(tensors) if addresses is None else addresses
        self.forms = forms


def workspace_size(blocks: int, segments: int) -> int:
    """Floats of scratch: four sums a block; and the CUDA kernel's counters."""
    return 4 * blocks + segments + 1


def locate(params: Sequence[Tensor], group_of: Sequence[int]) -> Located:
    """Parameters as the kernels need them."""
    forms = [
        (DTYPE_CODES.get(p.dtype, -1), group, reach(p), p.numel())
        for p, group in zip(params, group_of, strict=True)
    ]
    return Located(params, forms=_words(itertools.chain(*forms)))


def reach(tensor: Tensor) -> int:
    """Elements from the first to the last of a strided tensor."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def survey(params: list[Tensor]) -> tuple[list[Tensor | None], bytes, object, bytes | None]:
    """Parameters and their gradients as they are now.

    Returns:
        The gradients. The parameters' addresses. The parameters' forms (device, dtype, shape,
        strides, negative bit), to be compared with earlier ones. The gradients' addresses; None
        where one is not plain memory of its parameter's device, dtype and shape.
    """
    if dispatch.native is not None:
        return dispatch.native.survey(params)
    grads = [p.grad for p in params]
    forms = [(p.device, p.dtype, p.shape, p.stride(), p.is_neg()) for p in params]
    pairs = zip(params, grads, strict=True)
    plain = all(g is None or _plain(p, g) for p, g in pairs)
    return grads, packed_addresses(params), forms, packed_addresses(grads) if plain else None


def _plain(p: Tensor, g: Tensor) -> bool:
    return (
        type(g) is Tensor
        and g.layout is torch.strided
        and (g.device, g.dtype, g.shape) == (p.device, p.dtype, p.shape)
        and g.is_contiguous()
        and not g.is_neg()
    )


def packed_addresses(tensors: Sequence[Tensor | None]) -> bytes:
    if isinstance(tensors, Located):
        return tensors.addresses
    return _words(0 if t is None else t.data_ptr() for t in tensors)


def _words(numbers: Iterable[int]) -> bytes:
    return array("q", numbers).tobytes()
