"""Peers of the operator and of the per-example statistics. Tests check that each computes what
ours does: none is a strawman. A peer's package is imported when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.models import find_biases
from beft_ext.tap import Tap

Inputs = Mapping[str, Tensor]
Squares = Callable[[], dict[str, Tensor]]


def eager_stats(dy: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """``bias_grad_stats`` as plain torch writes it: sum, square, sum."""
    grads = dy.sum(1, dtype=torch.float32)
    grad = grads.sum(0)
    total += grad
    squares += grads.square().sum(0)
    return grad


def eager_rows(dy: Tensor, out: Tensor) -> None:
    """``bias_example_grads`` as plain torch writes it: sum in fp32, then copy or cast."""
    if out.dtype == torch.float32:
        torch.sum(dy, 1, dtype=torch.float32, out=out)
    else:
        out.copy_(dy.sum(1, dtype=torch.float32))


# Each of the following makes, for a model and a batch, a function that gives sum_i g_i^2 of every
# bias by its parameter's name; g_i is the gradient of example i's own loss.


def tapped(model: nn.Module, inputs: Inputs) -> Squares:
    """Ours: the statistics ride on the one backward of the whole batch."""
    rows = len(inputs["labels"])
    model.requires_grad_(False)
    tap = Tap(model, find_biases(model))

    def call() -> dict[str, Tensor]:
        for site in tap.sites:
            site.grad_sum_sq.zero_()
            for leaf in site.leaves:
                leaf.grad = None
        tap.step(rows, scale=float(rows))
        model(**inputs).loss.backward()
        return {bias.parameter: squares for bias, (_, squares) in tap.statistics().items()}

    return call


def plain(model: nn.Module, inputs: Inputs) -> Callable[[], None]:
    """No statistics: gradients of the batch by autograd alone."""
    own = _trained(model)

    def call() -> None:
        for parameter in own.values():
            parameter.grad = None
        model(**inputs).loss.backward()

    return call


def batch_of_one(model: nn.Module, inputs: Inputs) -> Squares:
    """A forward and a backward for each example."""
    own = _trained(model)

    def call() -> dict[str, Tensor]:
        squares = {n: torch.zeros_like(p) for n, p in own.items()}
        for i in range(len(inputs["labels"])):
            loss = model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss
            grads = torch.autograd.grad(loss, list(own.values()))
            for square, grad in zip(squares.values(), grads, strict=True):
                square += grad.square()
        return squares

    return call


def vmap(model: nn.Module, inputs: Inputs) -> Squares:
    """``torch.func.vmap(grad)``."""
    rows = _by_vmap(model, inputs)
    return lambda: {n: g.square().sum(0) for n, g in rows().items()}


def _by_vmap(model: nn.Module, inputs: Inputs) -> Squares:
    values = {n: p.detach() for n, p in _trained(model).items()}

    def loss(values: dict[str, Tensor], one: dict[str, Tensor]) -> Tensor:
        single = {k: v.unsqueeze(0) for k, v in one.items()}
        found: Tensor = torch.func.functional_call(model, values, (), single).loss
        return found

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
    return lambda: per_example(values, dict(inputs))


def opacus(model: nn.Module, inputs: Inputs) -> Squares:
    """Opacus: hooks that keep each example's gradient in ``grad_sample``."""
    rows = opacus_rows(model, inputs)
    return lambda: {n: g.square().sum(0) for n, g in rows().items()}


def _sampled(model: nn.Module) -> tuple[dict[str, Any], nn.Module]:
    from opacus import GradSampleModule

    own = _trained(model)
    return own, GradSampleModule(model, loss_reduction="mean")


def backpack(model: nn.Module, inputs: Inputs) -> Squares:
    """BackPACK's ``SumGradSquared``, undone of the mean over the batch."""
    from backpack import backpack as extended, extend
    from backpack.extensions import SumGradSquared

    own, rows = _trained(model), len(inputs["labels"])
    extend(model)
    lossy = extend(nn.CrossEntropyLoss())

    def call() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        with extended(SumGradSquared()):
            lossy(logits, inputs["labels"]).backward()
        return {n: p.sum_grad_squared * rows**2 for n, p in own.items()}

    return call


def fastdp(model: nn.Module, inputs: Inputs) -> Squares:
    """FastDP's bias-only mode. It keeps no square of an element, only each example's norm."""
    from fastDP import PrivacyEngine

    _trained(model)
    rows = len(inputs["labels"])
    engine: Any = PrivacyEngine(
        model, batch_size=rows, sample_size=rows, epochs=1, noise_multiplier=0.0,
        clipping_style="all-layer", origin_params=None,
    )  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    engine.attach(optimizer)

    def call() -> dict[str, Tensor]:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        return {}

    return call


FISHER: dict[str, Callable[[nn.Module, Inputs], Callable[[], Any]]] = {
    "ours": tapped,
    "no statistics": plain,
    "torch.func vmap": vmap,
    "batch of one": batch_of_one,
    "Opacus": opacus,
    "BackPACK": backpack,
    "FastDP, biases only": fastdp,
}


# Each of the following makes a function that gives g_i of every bias by its parameter's name,
# (B, P); or projections of all of them together, (B, PROJECTED), by the name "projected".


def slab(model: nn.Module, inputs: Inputs) -> Squares:
    """Ours: rows of a slab, written by the one backward of the whole batch."""
    return _kept(model, inputs, None)


def folded(model: nn.Module, inputs: Inputs) -> Squares:
    """Ours, where the slab would not fit: as many columns as ``PROJECTED``, shared by the
    biases."""
    return _kept(model, inputs, PROJECTED // len(find_biases(model)))


def _kept(model: nn.Module, inputs: Inputs, columns: int | None) -> Squares:
    rows = len(inputs["labels"])
    model.requires_grad_(False)
    biases = find_biases(model)
    tap = Tap(model, biases)
    tap.keep_rows(rows, columns)

    def call() -> dict[str, Tensor]:
        for _, leaf in tap.leaves():
            leaf.grad = None
        tap.step(rows, scale=float(rows), row=0)
        model(**inputs).loss.backward()
        found = {bias.parameter: tap.rows(bias, rows) for bias in biases}
        return found if columns is None else {"projected": torch.cat(list(found.values()), 1)}

    return call


def vmap_rows(model: nn.Module, inputs: Inputs) -> Squares:
    """``torch.func.vmap(grad)``."""
    return _by_vmap(model, inputs)


def opacus_rows(model: nn.Module, inputs: Inputs) -> Squares:
    """Opacus: ``grad_sample``."""
    own, sampled = _sampled(model)

    def call() -> dict[str, Tensor]:
        sampled.zero_grad()
        sampled(**inputs).loss.backward()
        return {n: p.grad_sample for n, p in own.items()}

    return call


def traker(model: nn.Module, inputs: Inputs) -> Squares:
    """TRAK: gradients by ``torch.func``, as its own functional backend takes them, projected by
    its own projector."""
    from trak.projectors import BasicProjector, ProjectionType

    rows, device = _by_vmap(model, inputs), next(model.parameters()).device
    width = sum(model.get_parameter(b.parameter).numel() for b in find_biases(model))
    project = BasicProjector(width, PROJECTED, 0, ProjectionType.rademacher, device)

    def call() -> dict[str, Tensor]:
        whole = torch.cat([g.flatten(1) for g in rows().values()], 1)
        return {"projected": project.project(whole, model_id=0)}

    return call


PROJECTED = 2048  # TRAK's own number of columns
ROWS: dict[str, Callable[[nn.Module, Inputs], Callable[[], Any]]] = {
    "ours": slab,
    "no rows": plain,
    "torch.func vmap": vmap_rows,
    "Opacus": opacus_rows,
    f"ours, folded to {PROJECTED}": folded,
    f"TRAK, projected to {PROJECTED}": traker,
}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The biases by name; they alone require grad."""
    biases = find_biases(model)
    model.requires_grad_(False)
    return {b.parameter: model.get_parameter(b.parameter).requires_grad_(True) for b in biases}


@torch.no_grad()
def one_by_one(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[list[int]]]]
) -> list[list[float]]:
    """Options scored as the authors' loop does: the whole text of each alone, every position's
    logits, mean log-probability of the option's tokens."""
    device = next(model.parameters()).device
    scores = []
    for prompt, options in pairs:
        means = []
        for option in options:
            ids = torch.tensor([prompt + option], device=device)
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            taken = logs.gather(-1, ids[0, 1:, None]).squeeze(-1)
            means.append(float(taken[-len(option) :].mean()))
        scores.append(means)
    return scores
