"""What does a training step of the value bias cost, beside PEFT, the authors' way, BitFit, LoRA?

Two loads: steps of 16 x 128 tokens without padding, and a pass over sentences of the shipped
set, padded as each way pads. Tokens that are not padding a second, peak memory, and the loss
after the same number of steps. And ours where upper layers alone train. Writes
benchmarks/results/<device>/training.json.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from harness import measure, settings, show, write
from torch import Tensor
from ways import WAYS, Training, Way, ours
from workloads import BATCH, batch, chosen, classifier, padded_to

from beft_ext.commands import demo
from beft_ext.tasks import HeadObjective
from beft_ext.tasks.heads import LONGEST_TEXT

Batches = Sequence[Mapping[str, Tensor]]
SENTENCES = 4 * BATCH
# How a pass over the sentences is padded: (way, padding).
PASSES = {
    "ours": ("ours", "longest"),
    "ours, by length": ("ours", "by length"),
    "ours, by length, bf16": ("ours, bf16", "by length"),
    "ours, by length, compiled, bf16": ("ours, compiled, bf16", "by length"),
    "authors' way, padded to 128": ("authors' way", "128"),
    "authors' way": ("authors' way", "longest"),
    "PEFT BEFT, padded to 128": ("PEFT BEFT", "128"),
    "PEFT BEFT": ("PEFT BEFT", "longest"),
}


@functools.cache
def sentences(padding: str, count: int, device: str) -> Batches:
    """``count`` shipped sentences in batches: padded to 128, to each batch's longest, or to the
    longest of batches of like length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.minilm())
    objective = HeadObjective(demo.TASK, tokenizer)
    rows = demo.examples("train")[:count]
    made = objective.training(rows, BATCH, seed=0, by_length=padding == "by length")
    batches = [{k: v.to(device) for k, v in b.items()} for b in made]
    return [padded_to(LONGEST_TEXT, b) for b in batches] if padding == "128" else batches


def training(which: Way, config: dict[str, int], batches: Batches, device: str) -> Training:
    return Training(which, classifier(config, device), batches)


def from_layer(first: int, layers: int) -> str:
    return f"value@{first}-{layers - 1}"


def compared(
    makers: Mapping[str, Any], tokens: int, steps: int, arguments: argparse.Namespace, rounds: int
) -> dict[str, dict[str, Any]]:
    """``measure`` with the tokens a second and the loss of the last call's ``steps`` steps."""
    made: dict[str, Training] = {}

    def keep(name: str, make: Any) -> Training:
        made[name] = make()
        return made[name]

    kept = {name: functools.partial(keep, name, make) for name, make in makers.items()}
    found = measure(kept, arguments, rounds=rounds, memory=True)
    for name, s in found.items():
        if "missing" not in s:
            s["tokens_per_s"] = tokens / s["median_s"]
            s["loss"] = float(torch.stack(made[name].losses[-steps:]).mean())
    return found


def main() -> None:
    arguments = settings(__doc__, rounds=5)
    device, models = arguments.device, chosen(arguments.quick)
    results: dict[str, Any] = {"step": {}, "pass": {}}
    for name, config in models.items():
        batches = [batch(device)]
        makers = {
            which: functools.partial(training, way, config, batches, device)
            for which, way in WAYS.items()
        }
        rounds = arguments.rounds if name == next(iter(models)) else max(2, arguments.rounds // 2)
        tokens = batches[0]["input_ids"].numel()
        torch.compiler.reset()
        results["step"][name] = compared(makers, tokens, 1, arguments, rounds)
        show(f"step of {name}", results["step"][name])
    name, config = next(iter(models.items()))
    layers = config["num_hidden_layers"]
    makers = {
        terms: functools.partial(
            training, Way(functools.partial(ours, terms=terms)), config, [batch(device)], device
        )
        for terms in (from_layer(layers * k // 6, layers) for k in (0, 2, 4, 5))
    }
    results["layers"] = {name: compared(makers, tokens, 1, arguments, arguments.rounds)}
    show(f"layers of {name}", results["layers"][name])
    count = 2 * BATCH if arguments.quick else SENTENCES
    makers = {
        which: functools.partial(
            training, WAYS[way], config, sentences(padding, count, device), device
        )
        for which, (way, padding) in PASSES.items()
    }
    real = sum(int(b["attention_mask"].sum()) for b in sentences("longest", count, device))
    torch.compiler.reset()
    found = compared(makers, real, count // BATCH, arguments, arguments.rounds)
    results["pass"][f"{name}, {count} sentences"] = found
    show(f"pass of {name}", found)
    write("training", arguments, results)


if __name__ == "__main__":
    main()
