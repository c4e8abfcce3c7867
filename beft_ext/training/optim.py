"""``BiasAdamW``: AdamW over all biases in one step of one kernel, with their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.models import Bias
from beft_ext.models.wrappers import sharded, whole
from beft_ext.training.drift import Watch
from beft_ext.training.flat import BiasScore, Entry, Flat, OptimizerError, Work, form_of
from beft_ext.training.joined import Averaging
from beft_ext.training.optim_state import check_settings, checked_state, number
from beft_ext.training.preparation import prepared_of

__all__ = ["BiasAdamW", "BiasScore", "OptimizerError", "rate_factor"]


class BiasAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) with flat fp32 state, stepped by ``bias_adamw_step``.

    Its numbers equal those of ``torch.optim.AdamW`` to rounding, its state goes to and from
    there, and it takes the same arguments. A GradScaler's unscaling and skipping happen inside
    the step. Half-precision parameters have fp32 master copies; a value that is written into a
    parameter from outside holds.

    Args:
        params: a model, or what ``torch.optim.AdamW`` takes. Of a model all that requires grad
            trains; after ``prepare`` only the chosen slices of fused parameters. fp32, bf16 and
            fp16; fp64 runs on the reference backend. Any device, strides and gradient dtype. Of a
            model under ``fully_shard`` gradients become the mean of all ranks' with each backward.
        lr: learning rate; a number, or a scalar tensor that a scheduler may fill.
        betas, eps, weight_decay: as AdamW's, but ``weight_decay`` is 0 by default, as biases
            are trained without.
        max_grad_norm: clips the global norm of all gradients inside the step; 0 for no clipping.
        maximize: follow the gradient, not its opposite.
        foreach, fused, capturable: accepted and of no effect: the step is always one kernel, and
            can always be captured in a CUDA graph.
        amsgrad, differentiable: must be False.
    Attributes:
        grad_norm: global norm that the last step saw, unscaled and before clipping, a scalar.
    Raises:
        OptimizerError: settings out of range; a model that has no parameter that requires grad;
            parameters that are not dense floats, or are sharded.
    Example:
        >>> import torch, beft_ext
        >>> layer = torch.nn.Linear(2, 2)
        >>> optimizer = beft_ext.BiasAdamW([("bias", layer.bias)], lr=1e-3)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> round(optimizer.scores()["bias"].magnitude, 6)
        0.001
    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101); docs/definitions.md, section 4.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        max_grad_norm: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self.max_grad_norm = number("max_grad_norm", max_grad_norm)
        self.grad_norm = torch.zeros((), dtype=torch.float32, device="cpu")
        self._slices: dict[Tensor, list[Bias]] = {}
        self._flats: list[Flat] = []
        self._watch = Watch()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_settings(defaults)
        named = self._of_model(params) if isinstance(params, nn.Module) else params
        super().__init__(named, defaults)
        for group in self.param_groups:
            check_settings(group)
        self._build()

    def _of_model(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        model = whole(model, OptimizerError, adapted=True, replicas=True)
        prepared = prepared_of(model)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise OptimizerError("no parameter of the model requires grad: call prepare first")
        if away := next((n for n, p in named.items() if p.is_meta), None):
            raise OptimizerError(
                f"parameter '{away}' is offloaded and cannot train: prepare freezes it, and keeps "
                "what trains on its device"
            )
        if sharded(model):
            self._averaging = Averaging(named.values())
        every = dict(model.named_parameters(remove_duplicate=False))
        for bias in prepared.biases if prepared is not None else ():
            self._slices.setdefault(every[bias.parameter], []).append(bias)
        return list(named.items())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose state starts at zero.

        Args:
            param_group: as torch's: ``params``, and settings of their own.
        Raises:
            OptimizerError: the settings or the parameters do not fit; nothing was changed.
        """
        super().add_param_group(param_group)
        if self._flats:
            try:
                check_settings(self.param_groups[-1])
                self._build()
            except OptimizerError:
                del self.param_groups[-1]
                raise

    def _build(self) -> None:
        """Lay the state out anew, on the devices where the parameters are; values are kept."""
        flats = [Flat(entries, self._slices) for entries in self._entries()]
        for flat in flats:
            for p, views in flat.views.items():
                for key, old in self.state.get(p, {}).items():
                    views[key].copy_(old)
        self._flats = flats
        for flat in flats:
            self.state.update(flat.views)

    def _entries(self) -> list[list[Entry]]:
        """Parameters by device."""
        found: dict[torch.device, list[Entry]] = {}
        held: set[Tensor] = set()
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [""] * len(group["params"])
            for name, p in zip(names, group["params"], strict=True):
                entry = Entry(name or str(len(held)), p, index)
                if p in held:
                    raise OptimizerError(f"parameter '{entry.name}' is given twice")
                held.add(p)
                found.setdefault(p.device, []).append(entry)
        return list(found.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss again and gives it; as torch's.
        Returns:
            The closure's loss; None without a closure.
        Raises:
            OptimizerError: a gradient is sparse or of another shape than its parameter; a
                parameter's dtype, shape, strides or device changed after the first step; or the
                ranks of a process group have different gradients (looked at before steps 1, 2, 4,
                8 and so on).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if (odd := self._watch.odd(self.param_groups)) is not None:
            raise OptimizerError(odd)
        work = self._look()
        groups, rates = self._settings()
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        norm = None
        if len(work) > 1 and self.max_grad_norm > 0:
            norm = _global_norm(work, scale)
        norms = [
            flat.step(w, groups, rates, self.max_grad_norm, scale, found_inf, norm)
            for flat, w in zip(self._flats, work, strict=True)
        ]
        self.grad_norm = norms[0] if len(norms) == 1 else _norm_of(norms)
        return loss

    def _look(self) -> list[Work]:
        """What each device has to move, in tables that fit what is there."""
        if not self.state:  # emptied by someone, to begin anew
            self._build()
        work = [flat.look() for flat in self._flats]
        if None in work:
            self._fit_changes()
            work = [flat.look() for flat in self._flats]
        return [w for w in work if w is not None]

    def _fit_changes(self) -> None:
        """Lay out anew where parameters changed, if no step was taken; else raise."""
        begun = any(bool(flat.steps.any()) for flat in self._flats)
        for flat in self._flats:
            for i in flat.changes():
                before, now = flat.forms[i], form_of(flat.params[i])
                if begun:
                    raise OptimizerError(
                        f"parameter '{flat.names[i]}' changed after the optimizer's first step, "
                        f"from {before} to {now}: convert or move the model first, then build "
                        "the optimizer and load its state_dict"
                    )
                if before[:2] != now[:2]:  # dtype or shape: the old values say nothing
                    del self.state[flat.params[i]]
        self._build()

    def _settings(self) -> tuple[list[float], list[Tensor] | None]:
        """Six numbers of each group; and the rates as tensors, where one lies on a GPU."""
        groups: list[float] = []
        rates = None
        if any(isinstance(g["lr"], Tensor) and g["lr"].is_cuda for g in self.param_groups):
            rates = [
                torch.as_tensor(g["lr"], dtype=torch.float32).view(()) for g in self.param_groups
            ]
        for group in self.param_groups:
            lr = 0.0 if rates is not None else number("the learning rate", group["lr"])
            beta1, beta2 = map(float, group["betas"])
            sign = -1.0 if group["maximize"] else 1.0
            groups += (lr, beta1, beta2, float(group["eps"]), float(group["weight_decay"]), sign)
        return groups, rates

    def scores(self) -> dict[str, BiasScore]:
        """Each bias's scores after the last step, by name; waits for the device.

        After ``prepare`` the name is ``Bias.name``. Otherwise it is the parameter's name, or its
        number where it has none.
        """
        return {name: score for flat in self._flats for name, score in flat.scored()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a BiasAdamW or a torch.optim.AdamW over the same parameters.

        Where the state has no initial values (AdamW's has none), the scores keep counting from
        the present ones.

        Args:
            state_dict: what ``state_dict()`` gave, its tensors in any float dtype.
        Raises:
            OptimizerError: the state is of another optimizer or of other parameters, or holds a
                number that is not finite; nothing was changed.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups, pairs = checked_state(self.param_groups, state_dict)
        for flat in self._flats:
            for i in flat.changes():
                self.state.pop(flat.params[i], None)
        self._build()
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)
        with torch.no_grad():
            for p, values in pairs:
                views = self.state[p]
                views["step"].fill_(float(values.get("step", 0)))
                for key in ("exp_avg", "exp_avg_sq"):
                    views[key].copy_(values.get(key, torch.zeros((), device="cpu")))
                if "initial" in values:
                    views["initial"].copy_(values["initial"])
                if "master" in views:
                    views["master"].copy_(values.get("master", p))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("max_grad_norm", "grad_norm", "_slices", "_watch")
        held = {key: self.__dict__[key] for key in kept}
        return {**super().__getstate__(), **held, "_last": [f.scores for f in self._flats]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._build()
        for flat, scores in zip(self._flats, self.__dict__.pop("_last"), strict=True):
            flat.scores.copy_(scores)


def rate_factor(step: int, steps: int, warmup: float, decay: bool) -> float:
    """Factor of the learning rate at one training step.

    Args:
        step: number of the step, from 0.
        steps: number of all steps.
        warmup: fraction of the steps over which the rate rises linearly, in [0, 1].
        decay: after warm-up, let the rate fall linearly, so that it would be zero one step after
            the last; otherwise it stays at 1.
    Raises:
        OptimizerError: ``warmup`` is out of range.
    """
    if not 0 <= warmup <= 1:
        raise OptimizerError(f"warmup must be within 0 and 1, but is {warmup}")
    rising = max(1, round(warmup * steps))
    falling = (steps - step) / max(1, steps - rising + 1) if decay else 1.0
    return min((step + 1) / rising, falling)


def _global_norm(work: list[Work], scale: Tensor | None) -> Tensor:
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
        for w in work
        for g in w.grads
        if g is not None
    ]
    norm = _norm_of(norms) if norms else torch.zeros((), dtype=torch.float32, device="cpu")
    return norm if scale is None else norm / scale.to(norm.device)


def _norm_of(norms: list[Tensor]) -> Tensor:
    return torch.stack([n.to(norms[0].device, torch.float32) for n in norms]).norm()
