"""Ways to train biases, ours and the peers', each as a model that runs and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beft_ext.models import find_biases
from beft_ext.tap import Tap
from beft_ext.training.optim import BiasAdamW
from beft_ext.training.preparation import prepare

RATE = 1e-3
Ready = tuple[nn.Module, torch.optim.Optimizer]


def adamw(model: nn.Module) -> Ready:
    """torch's AdamW as it comes, over what requires grad; biases without weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)


def by_requires_grad(*parts: str) -> Callable[[nn.Module], Ready]:
    """The parameters whose names hold one of ``parts``, and the head."""

    def way(model: nn.Module) -> Ready:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(p in name for p in (*parts, "classifier")))
        return adamw(model)

    return way


def peft_beft(model: nn.Module) -> Ready:
    from peft import BeftConfig, get_peft_model

    config = BeftConfig(target_modules=["value"], modules_to_save=["classifier"])
    return adamw(get_peft_model(model, config))


def lora(model: nn.Module) -> Ready:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.0
    )
    return adamw(get_peft_model(model, config))


def ours(model: nn.Module, terms: str = "value") -> Ready:
    prepare(model, terms)
    return model, BiasAdamW(model, lr=RATE)


def compiled(model: nn.Module) -> Ready:
    _, optimizer = ours(model)
    return torch.compile(model, dynamic=True), optimizer


def with_statistics(model: nn.Module) -> Ready:
    """The value biases under the tap that gathers per-example statistics."""
    head = list(model.classifier.parameters())
    model.requires_grad_(False)
    for parameter in head:
        parameter.requires_grad_(True)
    tap = Tap(model, [b for b in find_biases(model) if b.term == "value"])
    model.register_forward_pre_hook(_announce(tap), with_kwargs=True)
    return model, BiasAdamW([leaf for _, leaf in tap.leaves()] + head, lr=RATE)


def _announce(tap: Tap) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: object, inputs: Mapping[str, Tensor]) -> None:
        rows = len(inputs["labels"])
        tap.step(rows, scale=float(rows))

    return hook


@dataclass(frozen=True)
class Way:
    make: Callable[[nn.Module], Ready]
    bf16: bool = False


WAYS = {
    "ours": Way(ours),
    "ours, with statistics": Way(with_statistics),
    "ours, compiled": Way(compiled),
    "ours, bf16": Way(ours, bf16=True),
    "ours, compiled, bf16": Way(compiled, bf16=True),
    "authors' way": Way(by_requires_grad("value.bias")),
    "PEFT BEFT": Way(peft_beft),
    "PEFT BEFT, bf16": Way(peft_beft, bf16=True),
    "BitFit": Way(by_requires_grad("bias")),
    "LoRA r=8": Way(lora),
}


class Training:
    """``model`` trained in one way; a call makes one step for each of the batches."""

    def __init__(self, way: Way, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.bf16, self.batches = way.bf16, batches
        self.device = next(model.parameters()).device.type
        self.model, self.optimizer = way.make(model)
        self.losses: list[Tensor] = []

    def __call__(self) -> None:
        for batch in self.batches:
            self.optimizer.zero_grad()
            with torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext():
                loss = self.model(**batch).loss
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.detach())
