"""Random numbers of one round, the tensors made of them, and what a call may end in."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from beft_ext.errors import BeftError

EPS = torch.finfo(torch.float32).eps
FLOATS = [torch.float32] * 3 + [torch.bfloat16, torch.float16, torch.float64]
REFUSALS = (BeftError, ValueError)


class Fault(Exception):
    """A wrong number, a write beside a tensor, or an error that explains nothing."""


class Refused(Exception):
    """The round's last call was refused in a sentence."""


class Draw(random.Random):
    """Random numbers of one round, and the tensors made of them."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.fences: list[Tensor] = []

    def chance(self, share: float) -> bool:
        return self.random() < share

    def fenced(self, tensor: Tensor) -> Tensor:
        """The same numbers, size and strides, between 4 KB of a pattern on either side."""
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = tensor.element_size() * (extent if tensor.numel() else 0)
        memory = torch.full((8192 + size,), 0x7B, dtype=torch.uint8)  # 1e36 as fp32
        self.fences.append(memory)
        flat = memory[4096 : 4096 + size].view(tensor.dtype)
        placed = flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset())
        expanded = tensor.numel() > 0 and any(
            s == 0 and n > 1 for n, s in zip(placed.shape, placed.stride(), strict=True)
        )
        flat.fill_(tensor.flatten()[0]) if expanded else placed.copy_(tensor)
        return placed

    def check_fences(self) -> None:
        for memory in self.fences:
            if not bool((memory[:4096] == 0x7B).all() and (memory[-4096:] == 0x7B).all()):
                raise Fault("memory beside a tensor was written")

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def strided(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers in any of the layouts that autograd hands over."""
        dims = len(shape)
        kind = self.choice(["contiguous"] * 3 + ["permuted", "steps", "expanded", "slice"])
        if kind == "permuted" and dims > 1:
            order = self.sample(range(dims), dims)
            stored = self.normal(*[shape[i] for i in order], dtype=dtype)
            return self.fenced(stored).permute([order.index(i) for i in range(dims)])
        if kind == "steps" and dims:
            step = self.randint(2, 3)
            return self.fenced(self.normal(*shape[:-1], shape[-1] * step, dtype=dtype))[..., ::step]
        if kind == "slice" and dims:
            stored = self.normal(*shape[:-1], shape[-1] + 5, dtype=dtype)
            return self.fenced(stored)[..., 2 : 2 + shape[-1]]
        if kind == "expanded":
            return self.fenced(self.normal(dtype=dtype).expand(shape))
        return self.fenced(self.normal(*shape, dtype=dtype))


def attempt(call: Callable[[], object]) -> object:
    """The call's result. Raises Refused for a clear refusal, Fault for any other error."""
    try:
        return call()
    except REFUSALS as error:
        text = str(error)
        if not 10 <= len(text) <= 300 or "\n" in text:
            raise Fault(f"an error that is no sentence: {error!r}") from error
        raise Refused(text) from error
    except Exception as error:
        raise Fault(f"{type(error).__name__}: {error}") from error
