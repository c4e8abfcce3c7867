"""What does a whole training step of the value bias cost, beside PEFT and the authors' way?

Forward, backward and optimizer step at 16 x 128 tokens. Prints medians with quartiles, and
writes benchmarks/results/<device>/training.json.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from bench_statistics import BATCH, CONFIGS, TOKENS
from harness import Case, interleaved, show, write
from torch import Tensor, nn

from beft_ext.models import find_biases
from beft_ext.optim import BiasAdamW
from beft_ext.preparation import prepare
from beft_ext.tap import Tap


def model_of(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**CONFIGS[name])
    make = transformers.AutoModelForSequenceClassification.from_config
    return make(config).to(device).train()


def stepping(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> Case:
    def step() -> None:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    return step


def ours(model: nn.Module, inputs: dict[str, Tensor]) -> Case:
    prepare(model, "value")
    return stepping(model, BiasAdamW(model, lr=1e-3), inputs)


def tapped(model: nn.Module, inputs: dict[str, Tensor]) -> Case:
    head = list(model.classifier.parameters())
    model.requires_grad_(False)
    for parameter in head:
        parameter.requires_grad_(True)
    tap = Tap(model, [b for b in find_biases(model) if b.term == "value"])
    optimizer = BiasAdamW([leaf for _, leaf in tap.leaves()] + head, lr=1e-3)
    step = stepping(model, optimizer, inputs)

    def with_statistics() -> None:
        tap.step(BATCH, scale=float(BATCH))
        step()

    return with_statistics


def authors(model: nn.Module, inputs: dict[str, Tensor]) -> Case:
    """requires_grad on the biases and the head, torch's AdamW as it comes."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("value.bias" in name or name.startswith("classifier"))
    trained = [p for p in model.parameters() if p.requires_grad]
    return stepping(model, torch.optim.AdamW(trained, lr=1e-3), inputs)


def peft(model: nn.Module, inputs: dict[str, Tensor]) -> Case:
    from peft import BeftConfig, get_peft_model

    config = BeftConfig(target_modules=["value"], modules_to_save=["classifier"])
    wrapped = get_peft_model(model, config)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    return stepping(wrapped, torch.optim.AdamW(trained, lr=1e-3), inputs)


def compiled(model: nn.Module, inputs: dict[str, Tensor]) -> Case:
    prepare(model, "value")
    return stepping(torch.compile(model), BiasAdamW(model, lr=1e-3), inputs)


def in_bf16(model: nn.Module, inputs: dict[str, Tensor]) -> Case:
    prepare(model, "value")
    step = stepping(model, BiasAdamW(model, lr=1e-3), inputs)

    def autocast() -> None:
        with torch.autocast(inputs["labels"].device.type, torch.bfloat16):
            step()

    return autocast


CASES = {
    "authors' way": authors,
    "ours": ours,
    "ours, with statistics": tapped,
    "PEFT BEFT": peft,
    "ours, compiled": compiled,
    "ours, bf16": in_bf16,
}


def case(name: str, which: str, device: str) -> Case:
    model = model_of(name, device)
    inputs = {
        "input_ids": torch.randint(5, 30000, (BATCH, TOKENS), device=device),
        "labels": torch.randint(0, 2, (BATCH,), device=device),
    }
    return CASES[which](model, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    results: dict[str, object] = {}
    for name in CONFIGS:
        cases = {which: case(name, which, arguments.device) for which in CASES}
        found = interleaved(cases, arguments.rounds, arguments.device)
        results[name] = found
        show(f"step of {name}", found, "authors' way")
    write("training", arguments.device, {"step": results})


if __name__ == "__main__":
    main()
