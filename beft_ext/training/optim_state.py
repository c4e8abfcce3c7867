"""Settings and state of an AdamW, looked at before they are taken."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from beft_ext.training.flat import OptimizerError

SETTINGS = ("lr", "betas", "eps", "weight_decay")  # of a group, in every AdamW's state
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of a parameter, in every AdamW's state
OWN = ("initial", "master")  # of a parameter, in a BiasAdamW's state


def number(name: str, value: Any, below: float = math.inf) -> float:
    """``value`` as a float. Raises OptimizerError unless it is one, in [0, below)."""
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptimizerError(f"{name} must be one number, but is {value!r}") from error
    if not 0 <= found < below:
        limit = "finite and not negative" if below == math.inf else f"in [0, {below:g})"
        raise OptimizerError(f"{name} must be {limit}, but is {found}")
    return found


def check_settings(group: Mapping[str, Any]) -> None:
    """Raise OptimizerError where a group's settings are out of range."""
    for name in ("amsgrad", "differentiable"):
        if group.get(name):
            raise OptimizerError(f"{name}=True is not possible with BiasAdamW: leave it out")
    if group.get("foreach") and group.get("fused"):
        raise OptimizerError("foreach and fused cannot both be True: leave them out")
    number("the learning rate", group["lr"])
    number("eps", group["eps"])
    number("weight_decay", group["weight_decay"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise OptimizerError(f"betas must be two numbers, but are {betas!r}")
    for beta in betas:
        number("betas", beta, below=1)


def checked_state(
    own: list[dict[str, Any]], state_dict: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[tuple[Tensor, Mapping[str, Any]]]]:
    """A copy of the groups' settings, and the values of each parameter, from ``state_dict``.

    Raises OptimizerError where the state does not fit.
    """
    try:
        saved = [dict(group) for group in state_dict["param_groups"]]
        numbers = [list(group.pop("params")) for group in saved]
        values = dict(state_dict["state"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OptimizerError(
            "this is no optimizer's state: it lacks 'param_groups' or 'state'"
        ) from error
    if [len(g["params"]) for g in own] != [len(n) for n in numbers]:
        raise OptimizerError("the state's parameter groups are not those of this optimizer")
    for group, settings in zip(own, saved, strict=True):
        for name in SETTINGS:
            if name not in settings:
                raise OptimizerError(f"this is another optimizer's state: its groups lack '{name}'")
        if settings.get("decoupled_weight_decay") is False and settings["weight_decay"]:
            raise OptimizerError("this is Adam's state, whose weight decay is not decoupled")
        check_settings({**group, **settings})
        settings.pop("param_names", None)  # scores keep this optimizer's names
    params = [p for group in own for p in group["params"]]
    pairs = [
        (p, values.get(i, {})) for p, i in zip(params, (i for n in numbers for i in n), strict=True)
    ]
    for p, found in pairs:
        _check_values(p, found)
    return copy.deepcopy(saved), pairs


def _check_values(p: Tensor, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise OptimizerError(f"the state holds {type(values).__name__} in place of a dictionary")
    if strange := set(values) - {*MOMENTS, *OWN}:
        raise OptimizerError(f"this is another optimizer's state: it holds '{min(strange)}'")
    if values and (missing := set(MOMENTS) - set(values)):
        raise OptimizerError(f"this is another optimizer's state: it lacks '{min(missing)}'")
    for key, value in values.items():
        if key == "step":
            if not number("the state's step", value).is_integer():
                raise OptimizerError(f"the state's step must be a whole number, but is {value}")
            continue
        if not isinstance(value, Tensor) or value.shape != p.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise OptimizerError(
                f"the state is of another model: {key} has shape {found}, the parameter "
                f"{tuple(p.shape)}"
            )
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise OptimizerError(f"the state holds a number in {key} that is not finite")
        if key == "exp_avg_sq" and bool((value < 0).any()):
            raise OptimizerError("the state holds a mean of squares (exp_avg_sq) below zero")
