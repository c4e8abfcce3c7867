"""What does one optimizer step over all biases cost? BiasAdamW, scores included, against torch's.

Prints medians with quartiles and writes benchmarks/results/<device>/optimizer.json.
"""

from __future__ import annotations

import argparse

import torch
from harness import Case, interleaved, show, write

from beft_ext.optim import BiasAdamW

# Widths of the bias vectors that train.
SETS = {
    "BERT-base": ([768] * 7 + [3072]) * 12 + [768, 2],
    "OPT-6.7B q/k/v": [4096] * 96,
}
PEERS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def biases(widths: list[int], device: str) -> list[torch.Tensor]:
    made = [torch.randn(w, device=device).requires_grad_() for w in widths]
    for bias in made:
        bias.grad = torch.randn_like(bias)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, object] = {}
    for name, widths in SETS.items():
        cases: dict[str, Case] = {
            "ours": BiasAdamW(biases(widths, arguments.device), lr=1e-3).step,
            "ours, clipped": BiasAdamW(
                biases(widths, arguments.device), lr=1e-3, max_norm=1.0
            ).step,
        }
        for peer, options in PEERS.items():
            cases[f"torch {peer}"] = torch.optim.AdamW(
                biases(widths, arguments.device), lr=1e-3, **options
            ).step
        flat = biases([sum(widths)], arguments.device)
        cases["torch fused, one tensor"] = torch.optim.AdamW(flat, lr=1e-3, fused=True).step
        found = interleaved(cases, arguments.rounds, arguments.device, repeat=5)
        results[name] = found
        show(f"{name} ({len(widths)}, {sum(widths):,})", found, "ours")
    write("optimizer", arguments.device, {"step": results})


if __name__ == "__main__":
    main()
