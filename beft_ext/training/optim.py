"""``BiasAdamW``: AdamW over all biases in one step of one kernel, with their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.models import Bias
from beft_ext.ops.bias_adamw_step import (
    Located,
    bias_adamw_step,
    gradients,
    locate,
    workspace_size,
)
from beft_ext.training.preparation import prepared_of

BLOCK = 1024  # elements that one block of the kernels takes
HALF = (torch.bfloat16, torch.float16)


class OptimizerError(BeftError, ValueError):
    """Settings, parameters or a state that do not fit."""


@dataclass(frozen=True)
class BiasScore:
    """What the last step says of one bias (or of a head's weight).

    beft, magnitude: of ``b`` against the value when the optimizer was built (DESIGN section 3);
    beft is NaN where either is zero. grad_norm: of the unscaled gradient before clipping.
    """

    beft: float
    magnitude: float
    grad_norm: float


@dataclass(frozen=True)
class _Segment:
    """One bias within a tensor: ``runs`` of (offset in parameter, gradient and tensor, length)."""

    name: str
    tensor: int
    runs: list[tuple[int, int, int, int]]


class BiasAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) with flat fp32 state, stepped by ``bias_adamw_step``.

    params: a model (what requires grad trains; after ``prepare`` only the chosen slices of
        fused parameters), or what torch.optim.AdamW takes. fp32, bf16, fp16 (fp32 master copies
        are kept); fp64 runs on the reference backend.
    lr: float, or a scalar tensor per group that a scheduler may fill (with ``capturable``).
    weight_decay: 0 by default, as biases are trained without. max_norm: clips the global norm of
        all gradients inside the step (0: no clipping; then clip outside as usual).
    Numbers equal torch.optim.AdamW's to rounding; ``state_dict`` goes to and from it. A
    GradScaler's unscaling and skipping happen inside the step.
    Attributes: ``grad_norm``, a scalar tensor, the global norm seen by the last step.
    Raises OptimizerError for settings out of range, parameters that changed device, sparse
    gradients, or a state of other parameters.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_norm: float = 0.0,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        if float(lr) == 0:
            raise OptimizerError("a learning rate of 0 trains nothing")
        self.max_norm, self.grad_norm = max_norm, torch.zeros(())
        self._slices: dict[int, list[Bias]] = {}
        self._flats: list[_Flat] = []
        self._built = False
        if not math.isfinite(max_norm) or max_norm < 0:
            raise OptimizerError(f"max_norm must be 0 (no clipping) or more, but is {max_norm}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(
            self._of_model(params) if isinstance(params, nn.Module) else params, defaults
        )
        for group in self.param_groups:
            _check(group)
        self._build()

    def _of_model(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        prepared = prepared_of(model)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise OptimizerError("no parameter of the model requires grad: call prepare first")
        for bias in prepared.biases if prepared is not None else ():
            self._slices.setdefault(id(named[bias.parameter]), []).append(bias)
        return list(named.items())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the new group's state starts at zero."""
        super().add_param_group(param_group)
        if self._built:
            _check(self.param_groups[-1])
            self._build()

    def _build(self) -> None:
        """Lay the state out anew, on the devices where the parameters are, values kept."""
        before = {p: dict(self.state[p]) for g in self.param_groups for p in g["params"]}
        by_device: dict[torch.device, list[tuple[str, Tensor, int]]] = {}
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names", [""] * len(group["params"]))
            for name, p in zip(names, group["params"], strict=True):
                by_device.setdefault(p.device, []).append((name, p, index))
        self._flats = [_Flat(entries, self._slices) for entries in by_device.values()]
        for flat in self._flats:
            for p, views in flat.views.items():
                for key, old in before[p].items():
                    views[key].copy_(old)
                self.state[p] = views
        self._built = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(flat.moved() for flat in self._flats):
            if any(bool(flat.steps.any()) for flat in self._flats):
                raise OptimizerError(
                    "a parameter changed its device after the optimizer's first step: "
                    "move the model first, then build the optimizer and load its state_dict"
                )
            self._build()
        groups, rates = self._settings()
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        max_norm = self.max_norm
        if max_norm > 0 and len(self._flats) > 1:
            scale, max_norm = self._clip_over_devices(scale), 0.0
        norms = [f.step(groups, rates, max_norm, scale, found_inf) for f in self._flats]
        self.grad_norm = (
            norms[0]
            if len(norms) == 1
            else torch.stack([n.to(norms[0].device) for n in norms]).norm()
        )
        return loss

    def _settings(self) -> tuple[list[float], list[Tensor] | None]:
        """Each group's six numbers; and the rates as tensors where one must stay on its device."""
        groups: list[float] = []
        rates = None
        if any(isinstance(g["lr"], Tensor) and g["lr"].is_cuda for g in self.param_groups):
            rates = [torch.as_tensor(g["lr"]) for g in self.param_groups]
        for group in self.param_groups:
            lr = 0.0 if rates is not None else float(group["lr"])
            if not 0 <= lr < math.inf:
                raise OptimizerError(f"the learning rate must be finite and not negative: {lr}")
            beta1, beta2 = group["betas"]
            sign = -1.0 if group["maximize"] else 1.0
            groups += [lr, beta1, beta2, group["eps"], group["weight_decay"], sign]
        return groups, rates

    def _clip_over_devices(self, scale: Tensor | None) -> Tensor:
        """The scale to divide gradients by so that those of all devices are clipped together."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        unscaled = norm if scale is None else norm / scale.to(norm.device)
        widened = ((unscaled + 1e-6) / self.max_norm).clamp(min=1)
        return widened if scale is None else widened * scale.to(norm.device)

    def scores(self) -> dict[str, BiasScore]:
        """Each bias's scores after the last step, by name: ``<layer>.<term>`` after ``prepare``,
        else the parameter's name, or its number where it has none. Waits for the device."""
        return {name: score for flat in self._flats for name, score in flat.scored()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of a BiasAdamW or a torch.optim.AdamW over the same parameters, in any dtype.

        Everything is checked before anything changes. Where the state has no initial values
        (AdamW's has none), scores keep counting from the present ones.
        """
        if not {"param_groups", "state"} <= state_dict.keys():
            raise OptimizerError("this is no optimizer's state: it lacks 'param_groups' or 'state'")
        own, saved = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in own] != [len(g["params"]) for g in saved]:
            raise OptimizerError("the state's parameter groups are not those of this optimizer")
        pairs = [
            (p, state_dict["state"].get(i, {}))
            for g, s in zip(own, saved, strict=True)
            for p, i in zip(g["params"], s["params"], strict=True)
        ]
        for p, values in pairs:
            _check_state(p, values)
        for group, s in zip(own, saved, strict=True):
            if s.get("amsgrad"):
                raise OptimizerError("a state with amsgrad cannot be taken over")
            _check({**group, **s})
        for group, s in zip(own, saved, strict=True):
            group.update({k: v for k, v in s.items() if k != "params"})
            group.setdefault("maximize", False)
        with torch.no_grad():
            for p, values in pairs:
                views = self.state[p]
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    views[key].copy_(torch.as_tensor(values.get(key, 0)))
                if "initial" in values:
                    views["initial"].copy_(values["initial"])
                if "master" in views:
                    views["master"].copy_(values.get("master", p))


class _Flat:
    """The parameters of one device, their flat state and the table of segments and blocks."""

    def __init__(
        self, entries: list[tuple[str, Tensor, int]], slices: Mapping[int, list[Bias]]
    ) -> None:
        params = [p for _, p, _ in entries]
        self.params = Located(params, locate(params))
        self.group_of = [group for _, _, group in entries]
        self.device = self.params[0].device
        for name, p, _ in entries:
            if p.dtype not in (torch.float32, torch.float64, *HALF):
                raise OptimizerError(f"parameter '{name}' is {p.dtype}, not a float type")
        self.half = [i for i, p in enumerate(self.params) if p.dtype in HALF]
        double = any(p.dtype == torch.float64 for p in self.params)
        dtype = torch.float64 if double else torch.float32
        sizes = [p.numel() for p in self.params]
        rows = 4 if self.half else 3
        self.state = torch.zeros(rows, sum(sizes), dtype=dtype, device=self.device)
        self.steps = torch.zeros(len(self.params), device=self.device)
        self.views: dict[Tensor, dict[str, Tensor]] = {}
        self.segments: list[_Segment] = []
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        for i, ((name, p, _), start) in enumerate(zip(entries, starts, strict=True)):
            parts = [row[start : start + p.numel()].view(p.shape) for row in self.state]
            parts[2].copy_(p.detach())
            views = {"step": self.steps[i], "exp_avg": parts[0], "exp_avg_sq": parts[1]}
            views["initial"] = parts[2]
            if p.dtype in HALF:
                views["master"] = parts[3]
                parts[3].copy_(p.detach())
            self.views[p] = views
            self.segments += _segments(i, name or str(i), p, slices.get(id(p)))
        self._lay_out(starts)
        self.versions = [self.params[i]._version for i in self.half]

    def _lay_out(self, starts: list[int]) -> None:
        blocks, first = [], [0]
        for number, segment in enumerate(self.segments):
            for at_param, at_grad, at_tensor, length in segment.runs:
                for k in range(0, length, BLOCK):
                    flat = starts[segment.tensor] + at_tensor + k
                    size = min(BLOCK, length - k)
                    blocks.append([segment.tensor, number, at_param + k, at_grad + k, flat, size])
            first.append(len(blocks))
        self.blocks = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        self.first_blocks = torch.tensor(first, dtype=torch.int64, device=self.device)
        self.scores = torch.zeros(len(self.segments), 4, device=self.device)
        sizes = [sum(run[3] for run in s.runs) for s in self.segments]
        size = workspace_size(len(blocks), len(self.segments))
        self.workspace = torch.zeros(size, device=self.device)
        self.owner = torch.repeat_interleave(torch.tensor(sizes))
        where = [
            torch.arange(starts[s.tensor] + at, starts[s.tensor] + at + n)
            for s in self.segments
            for _, _, at, n in s.runs
        ]
        self.where = torch.cat(where)
        self.widths = sizes

    def moved(self) -> bool:
        """Whether a parameter left the device: not without a new address."""
        now = locate(self.params)
        if now != self.params.addresses:
            if any(p.device != self.device for p in self.params):
                return True
            self.params.addresses = now
        return False

    def step(
        self,
        groups: list[float],
        rates: list[Tensor] | None,
        max_norm: float,
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor:
        grads = gradients(self.params)
        if not isinstance(grads, Located):
            if any(g.is_sparse for g in grads if g is not None):
                raise OptimizerError("sparse gradients are not supported: use dense ones")
            grads = [None if g is None else g.contiguous() for g in grads]
        self._follow_outside_changes()
        norm = bias_adamw_step(
            self.params,
            grads,
            self.state,
            self.steps,
            self.scores,
            self.blocks,
            self.first_blocks,
            self.group_of,
            groups,
            self.workspace,
            lr=None if rates is None else torch.stack([r.to(self.device) for r in rates]).float(),
            max_norm=max_norm,
            grad_scale=None if scale is None else scale.to(self.device),
            found_inf=None if found_inf is None else found_inf.to(self.device),
        )
        # The kernels write through raw addresses; autograd must learn of it.
        torch.autograd.graph.increment_version(self.params)
        self.versions = [self.params[i]._version for i in self.half]
        return norm

    def _follow_outside_changes(self) -> None:
        """A half-precision parameter that was written to since the last step: renew its master."""
        for i, version in zip(self.half, self.versions, strict=True):
            p = self.params[i]
            if p._version != version:
                self.views[p]["master"].copy_(p.detach())

    def scored(self) -> Iterable[tuple[str, BiasScore]]:
        rows = self.scores.double().cpu()
        squares = self.state[2].cpu().double().square()[self.where]
        initial = squares.new_zeros(len(rows)).index_add_(0, self.owner, squares)
        dot, change = rows[:, 1], rows[:, 2]
        current = (initial + 2 * dot + change).clamp(min=0)
        # 1 - <b, b0> / max^2, each case without the subtraction of nearly equal numbers.
        grown = (dot + change) / current
        beft = torch.where(current > initial, grown, -dot / initial)
        beft[(initial == 0) | (current == 0)] = math.nan
        for i, segment in enumerate(self.segments):
            magnitude = float(rows[i, 0]) / self.widths[i]
            yield segment.name, BiasScore(float(beft[i]), magnitude, float(rows[i, 3]) ** 0.5)


def rate_factor(step: int, steps: int, warmup: float, decay: bool) -> float:
    """Factor of the rate at ``step`` (from 0) of ``steps``: rises over the share ``warmup`` of
    them, then stays at 1, or with ``decay`` falls linearly to zero behind the last."""
    rising = max(1, round(warmup * steps))
    falling = (steps - step) / max(1, steps - rising + 1) if decay else 1.0
    return min((step + 1) / rising, falling)


def _segments(index: int, name: str, p: Tensor, biases: list[Bias] | None) -> list[_Segment]:
    if biases is None:
        return [_Segment(name, index, _runs(name, p))]
    segments = []
    for bias in biases:
        period, width = p.numel() // bias.groups, bias.stop - bias.start
        at = [group * period + bias.start for group in range(bias.groups)]
        segments.append(_Segment(bias.name, index, [(a, a, a, width) for a in at]))
    return segments


def _runs(name: str, p: Tensor) -> list[tuple[int, int, int, int]]:
    if p.is_contiguous():
        return [(0, 0, 0, p.numel())]
    if p.ndim == 2 and p.stride(1) == 1:  # a leaf over the slices of an interleaved projection
        rows, width = p.shape
        return [(r * p.stride(0), r * width, r * width, width) for r in range(rows)]
    raise OptimizerError(f"parameter '{name}' is not contiguous: call .contiguous() on it first")


def _check(group: Mapping[str, Any]) -> None:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    if not 0 <= lr < math.inf:
        raise OptimizerError(f"the learning rate must be finite and positive, but is {lr}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise OptimizerError(f"betas must be in [0, 1), but are {group['betas']}")
    if not group["eps"] >= 0 or not 0 <= group["weight_decay"] < math.inf:
        raise OptimizerError("eps and weight_decay must not be negative")


def _check_state(p: Tensor, values: Mapping[str, Any]) -> None:
    for key in ("exp_avg", "exp_avg_sq", "initial", "master"):
        if key not in values:
            continue
        value = values[key]
        if not isinstance(value, Tensor) or value.shape != p.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise OptimizerError(
                f"the state is of another model: {key} has shape {found}, the parameter "
                f"{tuple(p.shape)}"
            )
        if not bool(value.isfinite().all()):
            raise OptimizerError(f"the state holds a number in {key} that is not finite")
