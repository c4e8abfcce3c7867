"""What does one optimizer step over all biases cost? BiasAdamW, scores included, against torch's.

Writes benchmarks/results/<device>/optimizer.json.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from harness import Case, measure, settings, show, write

from beft_ext.training.optim import BiasAdamW


def encoder(layers: int, width: int, wide: int) -> list[int]:
    """Biases of an encoder's layers: four of attention, two of the MLP, two of the norms."""
    return ([width] * 7 + [wide]) * layers


# Widths of the bias vectors that train.
SETS = {
    "BERT-base": encoder(12, 768, 3072),
    "RoBERTa-large": encoder(24, 1024, 4096),
    "OPT-1.3B": encoder(24, 2048, 8192),
    "OPT-6.7B": encoder(32, 4096, 16384),
    "OPT-6.7B, q/k/v": [4096] * 96,
    "Qwen2-7B": [3584, 512, 512] * 28,
}
Optimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def bitsandbytes(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    made: torch.optim.Optimizer = bnb.optim.AdamW32bit(params, lr=1e-3, weight_decay=0.0)
    return made


def apex(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    made: torch.optim.Optimizer = FusedAdam(params, lr=1e-3, weight_decay=0.0)
    return made


adamw: Callable[..., Optimizer] = functools.partial(
    functools.partial, torch.optim.AdamW, lr=1e-3, weight_decay=0.0
)
OPTIMIZERS: dict[str, Optimizer] = {
    "ours": functools.partial(BiasAdamW, lr=1e-3),
    "ours, clipped": functools.partial(BiasAdamW, lr=1e-3, max_grad_norm=1.0),
    "torch for-loop": adamw(foreach=False),
    "torch foreach": adamw(foreach=True),
    "torch fused": adamw(fused=True),
    "bitsandbytes": bitsandbytes,
    "apex": apex,
}


def case(make: Optimizer, widths: list[int], device: str) -> Case:
    params = [torch.randn(w, device=device).requires_grad_() for w in widths]
    for p in params:
        p.grad = torch.randn_like(p)
    step: Case = make(params).step
    return step


def main() -> None:
    arguments = settings(__doc__, rounds=40)
    results: dict[str, Any] = {}
    for name, widths in {"tiny": [8] * 4}.items() if arguments.quick else SETS.items():
        makers = {
            which: functools.partial(case, make, widths, arguments.device)
            for which, make in OPTIMIZERS.items()
        }
        results[name] = measure(makers, arguments, repeat=5)
        show(f"{name} ({len(widths)}, {sum(widths):,})", results[name])
    write("optimizer", arguments, {"step": results})


if __name__ == "__main__":
    main()
