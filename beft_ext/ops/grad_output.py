"""``grad_output`` as operators take it: what fits, where it lies, how GPU kernels cut it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from beft_ext.ops import checks, dispatch
from beft_ext.ops.checks import DTYPE_CODES, OperatorError

# Of grad_output: address, dtype, batch, tokens, width, three strides, and the offsets' address (0:
# none); then what the operator's ``..._arguments`` of the native module says of what is written.
Numbers = tuple[int, ...]


class GradOutput(NamedTuple):
    """What a backend reads. ``numbers`` is None for fp64, or where there is no native module."""

    dy: Tensor
    offsets: Tensor | None
    scale: float
    numbers: Numbers | None

    def sizes(self) -> tuple[int, int, int]:
        """Examples, tokens and width."""
        if self.offsets is None:
            return self.dy.shape[0], self.dy.shape[1], self.dy.shape[2]
        return len(self.offsets) - 1, self.dy.shape[0], self.dy.shape[1]


def needs_dispatcher(grad_output: Tensor, *written: Tensor) -> bool:
    """Whether someone listens to operators: a compiler, autograd (which then refuses to go back
    through this one), a tensor subclass or a mode. For a small bias the dispatcher's wrapper costs
    several times the work itself."""
    return (
        torch.compiler.is_compiling()
        or set(map(type, (grad_output, *written))) != {Tensor}
        or (grad_output.requires_grad and torch.is_grad_enabled())
        or grad_output.is_meta
        or is_in_torch_dispatch_mode()
    )


def check(dy: Tensor, offsets: Tensor | None) -> tuple[int, int, torch.dtype]:
    """Examples, width, and the dtype that sums are kept in.

    Raises OperatorError for all that does not fit, but the values of the offsets: those are read
    beside the kernels.
    """
    if dy.layout is not torch.strided or dy.ndim != (3 if offsets is None else 2):
        shape = "(B, T, H)" if offsets is None else "(N, H) beside example_offsets"
        raise OperatorError(
            f"grad_output must be dense of shape {shape}, but is {checks.described(dy)}"
        )
    if dy.dtype not in DTYPE_CODES and dy.dtype is not torch.float64:
        raise OperatorError(f"grad_output must be a float tensor, but its dtype is {dy.dtype}")
    dtype = torch.float32 if dy.dtype in DTYPE_CODES else torch.float64
    if offsets is None:
        return dy.shape[0], dy.shape[2], dtype
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise OperatorError(
            "example_offsets must be a vector of B + 1 entries, "
            f"but its shape is {tuple(offsets.shape)}"
        )
    checks.require("example_offsets", offsets, offsets.shape, torch.int64, dy.device)
    return offsets.shape[0] - 1, dy.shape[1], dtype


def bad_offsets(rows: int) -> OperatorError:
    return OperatorError(f"example_offsets must ascend within [0, {rows}], the rows there are")


def check_values(read: GradOutput) -> None:
    """Raise OperatorError unless the offsets ascend within ``[0, rows]``; the host reads them."""
    offsets, rows = read.offsets, len(read.dy)
    if offsets is None:
        return
    inside = offsets[0] >= 0 and offsets[-1] <= rows
    if not inside or bool((offsets.diff() < 0).any()):
        raise bad_offsets(rows)


def readable(
    look: str,
    check: Callable[..., None],
    dy: Tensor,
    offsets: Tensor | None,
    scale: float,
    *written: Tensor,
) -> tuple[str, GradOutput]:
    """The backend for ``grad_output``, and what it reads, once everything fits.

    Args:
        look: of the native module, gives the numbers that kernels are told of all tensors, None
            where something does not fit.
        check: says what does not fit: all that ``look`` looks at, but memory.
    Raises:
        OperatorError: what ``check`` says, or a tensor has no memory.
        BackendError: where a forced backend does not read this device's memory.
    """
    native = dispatch.native
    seen = None if native is None else getattr(native, look)(dy, offsets, *written)
    if seen is None:
        check(dy, offsets, *written)
        dy = dy.resolve_neg()
        if native is not None and dy.dtype in DTYPE_CODES:
            checks.require_memory(dy, *written)
            seen = getattr(native, look)(dy, offsets, *written)
            if seen is None:  # of storages that are not one to torch
                raise OperatorError("grad_output and what is written must not share memory")
    name = dispatch.choose(dy.device)
    return name if dy.dtype in DTYPE_CODES else "reference", GradOutput(dy, offsets, scale, seen)


def chunk_count(batch: int, tokens: int, width: int) -> int:
    """Chunks of rows into which the GPU kernels cut each example.

    Enough for about 1024 blocks of 128 columns, none shorter than 64 rows on average. It depends
    on the shape alone, never on the device: the order of additions is the same everywhere.
    """
    blocks = batch * _ceil(width, 128)
    if blocks == 0 or blocks >= 1024:
        return 1
    return max(1, min(_ceil(1024, blocks), _ceil(tokens, 64), 256))


def _ceil(n: int, of: int) -> int:
    return -(-n // of)


def cuda_workspace(read: GradOutput) -> tuple[int, Tensor]:
    """Chunks of each example; and room for a sum and its error per example, chunk and column."""
    batch, tokens, width = read.sizes()
    chunks = chunk_count(batch, tokens, width)
    size = 2 * batch * chunks * width
    return chunks, torch.empty(size, dtype=torch.float32, device=read.dy.device)
