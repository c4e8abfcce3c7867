"""The trained parameters of one device, laid flat: state, tables for the kernel, scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from beft_ext.errors import BeftError
from beft_ext.models import Bias
from beft_ext.ops.bias_adamw_step import bias_adamw_step
from beft_ext.ops.bias_adamw_tables import (
    BLOCK,
    AdamWTables,
    Located,
    locate,
    survey,
    workspace_size,
)

HALF = (torch.bfloat16, torch.float16)
TRAINABLE = (torch.float32, torch.float64, *HALF)


class OptimizerError(BeftError, ValueError):
    """Settings, parameters or a state that do not fit."""


@dataclass(frozen=True)
class BiasScore:
    """What the last step says of one bias, or of a head's weight.

    Changes are counted from the value when the optimizer was built, or from the initial value in
    a state that was loaded.

    Attributes:
        beft: BEFT score; NaN where the bias is or was zero.
        magnitude: mean absolute change of an element, in the parameter's unit.
        grad_norm: norm of the unscaled gradient before clipping.
    Example:
        >>> import beft_ext
        >>> prepared = beft_ext.prepare(model, terms="value")
        >>> optimizer = beft_ext.BiasAdamW(model, lr=1e-3)
        >>> model(**loader[0]).loss.backward()
        >>> optimizer.step()
        >>> round(optimizer.scores()["0.value"].magnitude, 5)
        0.001
    Source: Huang et al. 2025 (arXiv 2509.15974); docs/definitions.md, section 4.
    """

    beft: float
    magnitude: float
    grad_norm: float


class Entry(NamedTuple):
    """One parameter: its name (or number), itself, its parameter group."""

    name: str
    parameter: Tensor
    group: int


class Form(NamedTuple):
    """The facts of a parameter that the tables depend on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device
    stride: tuple[int, ...]
    negative: bool

    def __str__(self) -> str:
        sign = ", the negative of its memory" if self.negative else ""
        return f"{self.dtype} {self.shape} on {self.device}, strides {self.stride}{sign}"


def form_of(p: Tensor) -> Form:
    return Form(p.dtype, tuple(p.shape), p.device, tuple(p.stride()), p.is_neg())


@dataclass(frozen=True)
class _Segment:
    """One bias within a parameter.

    Attributes:
        tensor: the parameter's number.
        runs: stretches of consecutive elements, each as its offsets in the parameter's memory, in
            the gradient and in the parameter's part of the flat state, and its length.
    """

    name: str
    tensor: int
    runs: list[tuple[int, int, int, int]]


class Work(NamedTuple):
    """What one step moves: parameters and gradients that the kernel can address.

    Attributes:
        stand_ins: copies in place of the parameters that it cannot, by the parameter's number.
    """

    params: Located
    grads: Located
    stand_ins: dict[int, Tensor]


class Flat:
    """The parameters of one device, their flat state and the table of segments and blocks.

    Raises:
        OptimizerError: for a parameter without plain memory of a float type.
    """

    def __init__(self, entries: Sequence[Entry], slices: Mapping[Tensor, list[Bias]]) -> None:
        self.names = [e.name for e in entries]
        for entry in entries:
            _require_plain(entry.name, entry.parameter)
        params = [e.parameter for e in entries]
        self.forms = [form_of(p) for p in params]
        self.group_of = [e.group for e in entries]
        self.params = locate(params, self.group_of)
        _, _, self.seen, _ = survey(self.params)
        self.device = params[0].device
        dtypes = {p.dtype for p in params}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        sizes = [p.numel() for p in params]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        rows = 4 if dtypes & set(HALF) else 3
        self.state = torch.zeros(rows, sum(sizes), dtype=self.dtype, device=self.device)
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=self.device)
        self.views: dict[Tensor, dict[str, Tensor]] = {}
        self.segments: list[_Segment] = []
        self.odd: set[int] = set()  # parameters whose elements are not runs of memory
        for i, (p, start) in enumerate(zip(params, starts, strict=True)):
            parts = [row[start : start + p.numel()].view(p.shape) for row in self.state]
            views = {"step": self.steps[i], "exp_avg": parts[0], "exp_avg_sq": parts[1]}
            views["initial"] = parts[2].copy_(p.detach().resolve_neg())
            if p.dtype in HALF:
                views["master"] = parts[3].copy_(p.detach().resolve_neg())
            self.views[p] = views
            runs = _runs(p)
            if runs is None:
                self.odd.add(i)
            self.segments += _segments(i, self.names[i], p, slices.get(p), runs)
        self._lay_out(starts)

    def _lay_out(self, starts: list[int]) -> None:
        blocks, first = [], [0]
        for number, segment in enumerate(self.segments):
            for at_param, at_grad, at_tensor, length in segment.runs:
                for k in range(0, length, BLOCK):
                    flat = starts[segment.tensor] + at_tensor + k
                    size = min(BLOCK, length - k)
                    blocks.append([segment.tensor, number, at_param + k, at_grad + k, flat, size])
            first.append(len(blocks))
        whole = {"dtype": torch.int64, "device": self.device}
        single = {"dtype": torch.float32, "device": self.device}
        self.blocks = torch.tensor(blocks, **whole).view(-1, 6)
        self.first_blocks = torch.tensor(first, **whole)
        self.scores = torch.zeros(len(self.segments), 4, **single)
        self.workspace = torch.zeros(workspace_size(len(blocks), len(self.segments)), **single)
        self.widths = [sum(run[3] for run in s.runs) for s in self.segments]
        self.places = [
            [(starts[s.tensor] + at, n) for _, _, at, n in s.runs] for s in self.segments
        ]

    def changes(self) -> list[int]:
        """Numbers of the parameters that are no longer what the tables were laid out for."""
        return [i for i, p in enumerate(self.params) if form_of(p) != self.forms[i]]

    def look(self) -> Work | None:
        """Parameters and gradients where they lie now; None where a parameter changed.

        Raises:
            OptimizerError: for a gradient that is not its parameter's.
        """
        grads, addresses, seen, grad_addresses = survey(self.params)
        if seen != self.seen:
            if self.changes():
                return None
            self.seen = seen
        self.params.addresses = addresses
        if grad_addresses is not None and not self.odd:
            return Work(self.params, Located(grads, grad_addresses), {})
        return self._with_stand_ins(grads)

    def _with_stand_ins(self, grads: list[Tensor | None]) -> Work:
        params, stand_ins = list(self.params), {}
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            self._require_fit(i, g)
            # Not cast to half precision: what is finite could become infinite.
            if i in self.odd or (p.dtype in HALF and g.dtype != p.dtype):
                params[i] = stand_ins[i] = self._stand_in(i)
            grads[i] = g.resolve_neg().to(params[i].dtype).contiguous()
        return Work(locate(params, self.group_of), Located(grads), stand_ins)

    def _require_fit(self, i: int, g: Tensor) -> None:
        p, name = self.params[i], self.names[i]
        if g.layout is not torch.strided:
            raise OptimizerError(
                f"the gradient of parameter '{name}' is sparse: use dense gradients "
                "(sparse=False of an embedding)"
            )
        if g.shape != p.shape or g.device != p.device or not g.is_floating_point():
            raise OptimizerError(
                f"the gradient of parameter '{name}' is {g.dtype} of shape {tuple(g.shape)} on "
                f"{g.device}, the parameter {p.dtype} of shape {tuple(p.shape)} on {p.device}: "
                "call zero_grad() and run the backward again"
            )
        if type(g) not in (Tensor, nn.Parameter):
            raise OptimizerError(
                f"the gradient of parameter '{name}' is a {type(g).__name__}: BiasAdamW steps "
                "plain tensors, whole in this process"
            )

    def _stand_in(self, i: int) -> Tensor:
        """A copy with its elements where the tables look for them, in fp32 for half precision."""
        p = self.params[i].detach()
        if p.dtype in HALF:
            master = self.views[self.params[i]]["master"]
            p = torch.where(master.to(p.dtype) == p, master, p.to(master.dtype))
        if i in self.odd:
            return p.clone(memory_format=torch.contiguous_format)
        stride = self.forms[i].stride
        return torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(p)

    def step(
        self,
        work: Work,
        groups: list[float],
        rates: list[Tensor] | None,
        max_grad_norm: float,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        global_norm: Tensor | None,
    ) -> Tensor:
        """One step of what ``look`` found.

        Args:
            groups, rates and all that follows: as of ``AdamWTables``, on any device, rates one a
                group.
        Returns:
            The norm of this device's gradients.
        """
        norm = bias_adamw_step(
            AdamWTables(
                work.params,
                work.grads,
                self.state,
                self.steps,
                self.scores,
                self.blocks,
                self.first_blocks,
                self.group_of,
                groups,
                None if rates is None else torch.stack([self._single(r) for r in rates]),
                max_grad_norm,
                None if grad_scale is None else self._single(grad_scale),
                None if found_inf is None else self._single(found_inf),
                self.workspace,
                None if global_norm is None else self._single(global_norm),
            )
        )
        for i, value in work.stand_ins.items():
            p = self.params[i]
            p.copy_(value.to(p.dtype))  # torch loses the sign of a negative bit from or to fp16
            if p.dtype in HALF:
                self.views[p]["master"].copy_(value)
        # The kernels write through raw addresses; autograd must learn of it.
        torch.autograd.graph.increment_version(self.params)
        return norm

    def _single(self, scalar: Tensor) -> Tensor:
        return scalar.to(self.device, torch.float32)

    def scored(self) -> Iterable[tuple[str, BiasScore]]:
        """Each segment's name and scores after the last step."""
        rows = self.scores.double().cpu()
        values = self.state[2].cpu()
        squares = [
            sum(float(values[at : at + n].double().square().sum()) for at, n in places)
            for places in self.places
        ]
        initial = rows.new_tensor(squares)
        shift, growth = rows[:, 1], rows[:, 2]  # <d, b0> and <d, b>; their sum is |b|^2 - |b0|^2
        # 1 - <b, b0> / max^2, each case without the subtraction of nearly equal numbers.
        current = initial + shift + growth
        beft = torch.where(shift + growth > 0, growth / current, (0 - shift) / initial)
        zero = (growth == 0) & (shift <= -0.999 * initial)  # b = 0: then d is -b0
        beft[(initial == 0) | zero] = math.nan
        for i, segment in enumerate(self.segments):
            width = self.widths[i]
            magnitude = float(rows[i, 0]) / width if width else math.nan
            yield segment.name, BiasScore(float(beft[i]), magnitude, float(rows[i, 3]) ** 0.5)


def _require_plain(name: str, p: Tensor) -> None:
    """Raise OptimizerError unless ``p`` is a dense float tensor in memory of its own."""
    reason = None
    if isinstance(p, UninitializedParameter):
        reason = "is not initialized: run a forward pass first"
    elif p.is_meta:
        reason = "is on the meta device: give it values first"
    elif type(p.data) is not Tensor:
        reason = (
            f"is a {type(p.data).__name__}: BiasAdamW steps plain tensors, whole in one process "
            "(of a sharded model those of beft_ext.models.unsharded)"
        )
    elif p.layout is not torch.strided or p.dtype not in TRAINABLE:
        reason = f"is {p.dtype}, {p.layout}: BiasAdamW steps dense fp32, bf16, fp16 or fp64"
    elif any(s == 0 and n > 1 for n, s in zip(p.shape, p.stride(), strict=True)):
        reason = "holds one element in several places (expanded): call contiguous() on it first"
    if reason is not None:
        raise OptimizerError(f"parameter '{name}' {reason}")


def _segments(
    index: int,
    name: str,
    p: Tensor,
    biases: list[Bias] | None,
    runs: list[tuple[int, int, int, int]] | None,
) -> list[_Segment]:
    if biases is None:
        return [_Segment(name, index, [(0, 0, 0, p.numel())] if runs is None else runs)]
    segments = []
    for bias in biases:
        period, width = p.numel() // bias.groups, bias.stop - bias.start
        at = [group * period + bias.start for group in range(bias.groups)]
        segments.append(_Segment(bias.name, index, [(a, a, a, width) for a in at]))
    return segments


def _runs(p: Tensor) -> list[tuple[int, int, int, int]] | None:
    """The ``runs`` of a segment that is all of ``p``; None where the kernel has no way in."""
    if p.is_neg():
        return None
    if p.is_contiguous():
        return [(0, 0, 0, p.numel())]
    if p.ndim == 2 and p.stride(1) == 1 and p.stride(0) >= p.shape[1]:
        # A leaf over the slices of an interleaved projection.
        rows, width = p.shape
        return [(r * p.stride(0), r * width, r * width, width) for r in range(rows)]
    return None
