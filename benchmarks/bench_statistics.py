"""What do the statistics cost? The operator against eager torch, a tapped step against a plain one.

Prints medians with quartiles and writes benchmarks/results/<device>/statistics.json.
"""

from __future__ import annotations

import argparse
import itertools

import peers
import torch
import transformers
from harness import Case, interleaved, show, write

from beft_ext.models import find_biases
from beft_ext.ops import bias_grad_stats
from beft_ext.tap import Tap

SHAPES = [(16, 128, 768), (32, 512, 768), (64, 512, 1024), (32, 512, 4096)]
BATCH, TOKENS = 16, 128
CONFIGS = {
    "MiniLM": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "BERT-base": {},
}
CASES = ("plain", "tapped", "vmap", "batch of one")


def operator(device: str, rounds: int) -> dict[str, object]:
    """The reduction alone, with a copy of the input as the measure of the machine's memory."""
    results: dict[str, object] = {}
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            # Several inputs in turn, so that no cache holds the one that is read.
            inputs = [torch.randn(shape, device=device).to(dtype) for _ in range(4)]
            target = torch.empty_like(inputs[0])
            buffers = [torch.zeros(shape[-1], device=device) for _ in range(2)]
            turn = itertools.cycle(inputs).__next__
            cases: dict[str, Case] = {
                "ours": lambda turn=turn, b=buffers: bias_grad_stats(turn(), *b),
                "sum, square, sum": lambda turn=turn, b=buffers: peers.eager_stats(turn(), *b),
                "sum alone": lambda turn=turn: turn().sum((0, 1)),
                "copy": lambda turn=turn, target=target: target.copy_(turn()),
            }
            key = f"{'x'.join(map(str, shape))} {str(dtype)[6:]}"
            found = interleaved(cases, rounds, device, repeat=3)
            size = inputs[0].numel() * inputs[0].element_size()
            for name, s in found.items():
                s["bytes_per_s"] = size * (2 if name == "copy" else 1) / s["median_s"]
            results[key] = found
            show(key, found, "ours")
            gigabytes = {n: f"{s['bytes_per_s'] / 1e9:.1f}" for n, s in found.items()}
            print(f"{key:<26} GB/s {gigabytes}")
    return results


def step_case(name: str, case: str, device: str) -> Case:
    """One forward and backward of model ``name`` for all of its biases, by method ``case``."""
    torch.manual_seed(0)
    # vmap has no rule for the fused attention kernel's backward on every device.
    config = transformers.BertConfig(**CONFIGS[name], attn_implementation="sdpa")
    model = transformers.AutoModelForSequenceClassification.from_config(config).to(device).train()
    inputs = {
        "input_ids": torch.randint(5, 30000, (BATCH, TOKENS), device=device),
        "labels": torch.randint(0, 2, (BATCH,), device=device),
    }
    biases = find_biases(model)
    model.requires_grad_(False)
    if case == "tapped":
        tap = Tap(model, biases)
        leaves = [leaf for _, leaf in tap.leaves()]

        def tapped() -> None:
            for leaf in leaves:
                leaf.grad = None
            tap.step(BATCH, scale=float(BATCH))
            model(**inputs).loss.backward()

        return tapped
    own = {b.parameter: model.get_parameter(b.parameter).requires_grad_(True) for b in biases}
    method = {
        "plain": peers.plain_step,
        "vmap": peers.vmap_grad,
        "batch of one": peers.batch_of_one,
    }[case]
    return lambda: method(model, own, inputs)


def steps(device: str, rounds: int) -> dict[str, object]:
    """One training step, all bias terms: plain autograd, tapped, and the peers' statistics."""
    results: dict[str, object] = {}
    for name in CONFIGS:
        cases = {case: step_case(name, case, device) for case in CASES}
        found = interleaved(cases, rounds, device)
        results[name] = found
        show(f"step of {name}", found, "plain")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=9, help="of whole steps; operators x 5")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = {
        "operator": operator(arguments.device, 5 * arguments.rounds),
        "step": steps(arguments.device, arguments.rounds),
    }
    write("statistics", arguments.device, results)


if __name__ == "__main__":
    main()
