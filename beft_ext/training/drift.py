"""Whether ranks that train a model together still do: looked at in a few of the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beft_ext import parallel

Mark = tuple[float, float] | None  # of a gradient: its sum and its norm
TOLERANCE = 1e-3  # of the norm: sums of equal numbers may differ by rounding


class Watch:
    """Compares the ranks' gradients before steps 1, 2, 4, 8 and so on.

    A gradient that nobody adds up, as that of a bias which was added after the wrapping in
    DistributedDataParallel, would let the ranks' models come apart without a word.
    """

    def __init__(self) -> None:
        self.steps, self.over = 0, False

    def odd(self, groups: Sequence[dict[str, Any]]) -> str | None:
        """What differs between ranks, as a sentence; None where all is well, or is not looked at.

        groups: of the optimizer.
        """
        if self.over or not (dist.is_available() and dist.is_initialized()):
            return None
        self.steps += 1
        # Within a meeting it is the meeting that adds up.
        if self.steps & (self.steps - 1) or parallel.held() or _capturing():
            return None
        params = [p for group in groups for p in group["params"]]
        names = [n for g in groups for n in g.get("param_names", g["params"])]
        with parallel.meeting("BiasAdamW.step") as ranks:
            told = ranks.gather([(tuple(p.shape), _mark(p.grad)) for p in params])
        shapes = [[shape for shape, _ in own] for own in told]
        if ranks.size == 1 or any(own != shapes[0] for own in shapes):  # no replicas
            self.over = True
            return None
        for i, name in enumerate(names):
            marks = [own[i][1] for own in told]
            if other := [r for r, mark in enumerate(marks) if not _alike(mark, marks[0])]:
                what = f"'{name}'" if isinstance(name, str) else f"parameter {i}"
                return (
                    f"ranks 0 and {other[0]} have different gradients of {what}, so their models "
                    "would come apart: call prepare first, and then wrap the model in "
                    "DistributedDataParallel; of a sharded model build BiasAdamW(model)"
                )
        return None


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _mark(grad: Tensor | None) -> Mark:
    if grad is None or grad.layout is not torch.strided:
        return None
    wide = grad.detach().double()
    return float(wide.sum()), float(wide.norm())


def _alike(mark: Mark, other: Mark) -> bool:
    if mark is None or other is None:
        return mark is other
    scale = max(mark[1], other[1])
    if not math.isfinite(scale):  # the step will see to it
        return True
    return all(abs(a - b) <= TOLERANCE * scale for a, b in zip(mark, other, strict=True))
