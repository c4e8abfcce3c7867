"""What ours is held against, in plain PyTorch. Tests check these too: none is a strawman."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]


def eager_stats(dy: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """``bias_grad_stats`` as plain torch writes it: sum, square, sum."""
    grads = dy.sum(1, dtype=torch.float32)
    grad = grads.sum(0)
    total += grad
    squares += grads.square().sum(0)
    return grad


def plain_step(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Inputs) -> None:
    """Gradients of ``parameters`` by autograd alone, left in ``.grad``."""
    for parameter in parameters.values():
        parameter.grad = None
    model(**inputs).loss.backward()


def batch_of_one(
    model: nn.Module, parameters: Mapping[str, Tensor], inputs: Inputs
) -> dict[str, Tensor]:
    """``sum_i g_i^2`` by a forward and a backward for each example."""
    squares = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for i in range(len(inputs["labels"])):
        loss = model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for square, grad in zip(squares.values(), grads, strict=True):
            square += grad.square()
    return squares


def vmap_grad(
    model: nn.Module, parameters: Mapping[str, Tensor], inputs: Inputs
) -> dict[str, Tensor]:
    """``sum_i g_i^2`` by ``torch.func.vmap(grad)``."""

    def loss(values: dict[str, Tensor], one: dict[str, Tensor]) -> Tensor:
        single = {k: v.unsqueeze(0) for k, v in one.items()}
        found: Tensor = torch.func.functional_call(model, values, (), single).loss
        return found

    values = {n: p.detach() for n, p in parameters.items()}
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(
        values, dict(inputs)
    )
    return {n: g.square().sum(0) for n, g in grads.items()}
