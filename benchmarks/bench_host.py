"""What does the host add to a step? A BERT of twelve layers, so small that kernels do little.

A plain step of all biases by autograd, and the same with a tap at each bias; an optimizer's step
over them, beside torch's. Microseconds a tap are the difference, shared out. On a GPU kernels
wait for the host, so the clock shows the host there too. Writes
benchmarks/results/<device>/host.json.
"""

from __future__ import annotations

import functools

import torch
from bench_optimizer import Optimizer, case
from harness import Case, measure, settings, show, write
from torch import nn
from workloads import batch, classifier

from beft_ext import Tap, find_biases
from beft_ext.training.optim import BiasAdamW

SMALL = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 64, "vocab_size": 64}
ROWS, TOKENS = 4, 8


def model(device: str) -> nn.Module:
    """Frozen: each case lets the biases train in its own way."""
    return classifier(SMALL, device).requires_grad_(False)


def inputs(device: str) -> dict[str, torch.Tensor]:
    found = batch(device, ROWS, TOKENS)
    return found | {"input_ids": found["input_ids"] % SMALL["vocab_size"]}


def plain(device: str) -> Case:
    """Forward and backward, the biases' gradients by autograd."""
    made, given = model(device), inputs(device)
    leaves = [made.get_parameter(b.parameter).requires_grad_() for b in find_biases(made)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        made(**given).loss.backward()

    return step


def tapped(device: str, rows: bool = False) -> Case:
    """The same with statistics or, with ``rows``, each example's gradient into a slab."""
    made, given = model(device), inputs(device)
    tap = Tap(made, find_biases(made))
    leaves = [leaf for _, leaf in tap.leaves()]
    if rows:
        tap.keep_rows(ROWS)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        tap.step(ROWS, scale=float(ROWS), row=0 if rows else None)
        made(**given).loss.backward()

    return step


def optimizer(device: str, make: Optimizer) -> Case:
    return case(make, [bias.width for bias in find_biases(model("cpu"))], device)


def main() -> None:
    arguments = settings(__doc__, rounds=40)
    device = arguments.device
    fused = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, fused=True)
    steps = measure(
        {
            "plain": functools.partial(plain, device),
            "ours": functools.partial(tapped, device),
            "ours, single examples": functools.partial(tapped, device, rows=True),
        },
        arguments,
        repeat=5,
    )
    taps = len(find_biases(model("cpu")))
    for way, found in steps.items():
        if way != "plain" and "missing" not in found:
            found["us_a_tap"] = (found["median_s"] - steps["plain"]["median_s"]) / taps * 1e6
    optimizers = measure(
        {
            "ours": functools.partial(optimizer, device, functools.partial(BiasAdamW, lr=1e-3)),
            "torch fused": functools.partial(optimizer, device, fused),
        },
        arguments,
        repeat=20,
    )
    name = f"BERT of 12 layers, width {SMALL['hidden_size']}, {taps} biases"
    for title, found in (("step", steps), ("optimizer", optimizers)):
        show(title, found)
    write("host", arguments, {"step": {name: steps}, "optimizer": {name: optimizers}})


if __name__ == "__main__":
    main()
