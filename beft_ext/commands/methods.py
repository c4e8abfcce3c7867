"""Adaptation methods that training a chosen bias is compared with."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.models import (
    Bias,
    BiasError,
    find_biases,
    find_projections,
    head_parameters,
    parse_terms,
    pick,
    state,
)
from beft_ext.training.preparation import prepare, prepared_of


class MethodError(BeftError, ValueError):
    """An adaptation method that is unknown, or that this model or task does not allow."""


@dataclass(frozen=True)
class Method:
    """setup: of a fresh model, to what is trained in its place. lr: its usual rate, None for the
    rate that is asked for. terms: of a model, the bias terms that it trains, whose gains tell a
    rate. trains: False for those that only read a prompt. shots: examples before the prompt."""

    setup: Callable[[nn.Module, int], nn.Module]
    lr: float | None = None
    terms: Callable[[nn.Module], Sequence[str]] = lambda _: ()
    trains: bool = True
    shots: int = 0


@dataclass(frozen=True)
class Mask(state.Record):
    """Lies on a model of which ``count`` scattered parameters train."""

    count: int


def method(name: str) -> Method:
    """The method called ``name``: one of METHODS, a set of terms such as ``query+value@6-11``, or
    one of VARIANTS with what follows its colon, such as ``lora:value``, ``random-mask:100000`` or
    ``in-context:32``.

    Raises MethodError.
    """
    kind, colon, argument = name.partition(":")
    if colon and kind in VARIANTS:
        return VARIANTS[kind](argument)
    if name in METHODS:
        return METHODS[name]
    terms = _terms(name)
    return Method(lambda model, _: _biases(model, terms), terms=lambda _: [terms])


def _terms(text: str) -> str:
    """``text``, which is a set of terms. Raises MethodError."""
    try:
        parse_terms(text)
    except BiasError as error:
        raise MethodError(
            f"unknown method '{text}': use {', '.join(METHODS)}, or "
            f"{', '.join(f'{v}:...' for v in VARIANTS)}, or bias terms such as value or "
            f"query+value@6-11 ({error})"
        ) from error
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise MethodError(f"'{text}' is not a positive whole number")
    return int(text)


def trained(model: nn.Module) -> int:
    """Number of parameters that the method trains, the head's included."""
    mask = state.get(model, Mask)
    if mask is not None:
        return mask.count + sum(p.numel() for p in head_parameters(model))
    own = prepared_of(model)
    if own is not None:
        return sum(b.width for b in own.biases) + sum(t.numel() for t in own.head_initial.values())
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def kept_bytes(model: nn.Module) -> int:
    """Bytes of the files that hold what was trained."""
    from beft_ext.adapters import save_adapter

    if state.get(model, Mask) is not None:  # a value and a 32-bit place for each
        return 8 * trained(model)
    with tempfile.TemporaryDirectory() as folder:
        if prepared_of(model) is not None:
            save_adapter(model, folder)
        elif hasattr(model, "peft_config"):
            model.save_pretrained(folder)  # type: ignore[operator]
        else:
            return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))


def _biases(model: nn.Module, terms: str | Iterable[str]) -> nn.Module:
    prepare(model, terms)
    return model


def _untouched(model: nn.Module, _: int) -> nn.Module:
    return model.requires_grad_(False)


def _freeze_body(model: nn.Module) -> list[nn.Parameter]:
    """The head, which alone is left to train."""
    model.requires_grad_(False)
    head = head_parameters(model)
    for parameter in head:
        parameter.requires_grad_(True)
    return head


def _head(model: nn.Module, _: int) -> nn.Module:
    if not _freeze_body(model):
        raise MethodError("the model has no task head to train alone")
    return model


def _every_bias(model: nn.Module, _: int) -> nn.Module:
    return _biases(model, _own_terms(model))


def _own_terms(model: nn.Module) -> list[str]:
    return list(find_biases(model).terms)


def _everything(model: nn.Module, _: int) -> nn.Module:
    return model.requires_grad_(True)


def _random_mask(model: nn.Module, seed: int, count: int | None = None) -> nn.Module:
    """``count`` scattered parameters of the body, by default as many as the value term has, and
    the head."""
    head = {id(p) for p in head_parameters(model)}
    body = [p for p in model.parameters() if id(p) not in head]
    count = count or sum(
        p.bias.width for p in find_projections(model) if p.bias.term == "value" and p.linear
    )
    sizes = torch.tensor([p.numel() for p in body])
    if count > int(sizes.sum()):
        raise MethodError(f"a mask of {count} places is larger than the model")
    generator = torch.Generator().manual_seed(seed)
    places = _distinct(int(sizes.sum()), count, generator).sort().values
    for parameter, end in zip(body, sizes.cumsum(0).tolist(), strict=True):
        inside = places[(places >= end - parameter.numel()) & (places < end)]
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[inside - (end - parameter.numel())] = True
        mask = mask.view_as(parameter).to(parameter.device)
        # Parameters without a place in the mask need no gradient at all.
        parameter.requires_grad_(bool(mask.any()))
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, mask=mask: grad.where(mask, 0))
    state.put(model, Mask(count))
    return model


def _distinct(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``size``, without a permutation of all of them."""
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = torch.randint(size, (2 * (count - len(found)),), generator=generator)
        found = torch.cat([found, more]).unique()
        found = found[torch.randperm(len(found), generator=generator)]
    return found[:count]


def _peft(kind: str, terms: str | None = None, **options: object) -> Callable[..., nn.Module]:
    def setup(model: nn.Module, _: int) -> nn.Module:
        try:
            import peft
        except ImportError as error:
            raise MethodError("this method needs peft: pip install 'beft-ext[peft]'") from error
        where = {}
        if terms is not None:
            targets = {b.module for b in pick((p.bias for p in find_projections(model)), terms)}
            where["target_modules"] = sorted(targets)
        head = any(True for _ in head_parameters(model))
        task = "SEQ_CLS" if head else "CAUSAL_LM"
        config = getattr(peft, kind)(task_type=task, **where, **options)
        wrapped: nn.Module = peft.get_peft_model(model, config)
        return wrapped

    return setup


class LowRankBias(nn.Module):
    """A change of a bias ``(H,)`` that is a matrix of low rank, read row by row.

    H is split into the two factors that are nearest to each other, as 768 into 24 and 32; B
    starts at zero, so that nothing changes at first.
    Source: Huang et al. 2025 (arXiv 2509.15974), LoRA injected into a bias; rank and scale of
    the authors' code.
    """

    def __init__(self, width: int, rank: int, alpha: float, like: Tensor) -> None:
        super().__init__()
        short = max(d for d in range(1, math.isqrt(width) + 1) if width % d == 0)
        self.a = nn.Parameter(like.new_empty(rank, width // short))
        self.b = nn.Parameter(like.new_zeros(short, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """The change, ``(H,)``."""
        return self.scale * (self.a.T @ self.b.T).flatten()


def _low_rank(terms: str) -> Callable[[nn.Module, int], nn.Module]:
    def setup(model: nn.Module, _: int) -> nn.Module:
        places = pick((p.bias for p in find_projections(model) if p.linear), terms)
        _freeze_body(model)
        for place in places:
            module = model.get_submodule(place.module)
            change = LowRankBias(place.width, rank=8, alpha=1.0, like=next(module.parameters()))
            module.add_module(f"low_rank_{place.term}", change)
            module.register_forward_hook(_changed(place, change))
        return model

    return setup


def _changed(place: Bias, change: LowRankBias) -> Callable[[nn.Module, object, Tensor], Tensor]:
    """A hook that adds ``change`` to its slice of a projection's output ``(B, T, P)``."""

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        beside = output.shape[-1] // place.groups - place.stop
        added = change().to(output.dtype).view(place.groups, -1)
        return output + nn.functional.pad(added, (place.start, beside)).flatten()

    return hook


METHODS: dict[str, Method] = {
    "zero-shot": Method(_untouched, trains=False),
    "in-context": Method(_untouched, trains=False, shots=8),
    "head": Method(_head),
    "auto": Method(lambda model, _: model),  # the selection comes between, see comparison.py
    "all-biases": Method(_every_bias, terms=_own_terms),
    "full": Method(_everything, lr=2e-5),
    "random-mask": Method(_random_mask),
    "lora": Method(_peft("LoraConfig", "query+value", r=8, lora_alpha=16), lr=5e-4),
    "prefix": Method(_peft("PrefixTuningConfig", num_virtual_tokens=5), lr=1e-2),
    "peft-beft": Method(_peft("BeftConfig", "value")),
}

# By what follows the colon: terms, or a number.
VARIANTS: dict[str, Callable[[str], Method]] = {
    "lora": lambda text: replace(
        METHODS["lora"], setup=_peft("LoraConfig", _terms(text), r=8, lora_alpha=16)
    ),
    "low-rank": lambda text: Method(_low_rank(_terms(text))),
    "random-mask": lambda text: Method(partial(_random_mask, count=_count(text))),
    "in-context": lambda text: replace(METHODS["in-context"], shots=_count(text)),
}
