"""``select``: one short run of all candidate terms, and every score from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext import scores
from beft_ext.models import (
    Bias,
    BiasError,
    BiasMap,
    add_bias,
    find_biases,
    find_projections,
    pick,
)
from beft_ext.models.wrappers import whole
from beft_ext.selection.dead import QKV, dead_terms
from beft_ext.selection.result import Selection, SelectionError
from beft_ext.selection.run import BufferedLoader, ModelSnapshot, Run
from beft_ext.selection.settling import SETTLING, Settling
from beft_ext.tap import Tap, cuda_devices, require_untapped
from beft_ext.training.loss import Batch, Loss, model_loss, on_device, rows_of


def select(
    model: nn.Module,
    loader: Iterable[Batch],
    method: str = "beft",
    *,
    loss: Loss = model_loss,
    terms: str | Iterable[str] | None = None,
    biases: BiasMap | None = None,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 1e-3,
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    settle: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> Selection:
    """Train all candidate terms together for a short run and score each one.

    model: a transformers model whose output has ``loss``; compiled or not.
    loader: batches as keyword arguments of the model, first axis examples. Texts of a packed
        batch (``position_ids`` that start anew, or ``cu_seq_lens_q``) are examples each.
    method: 'beft', 'magnitude', 'fisher', 'example_fisher' or 'snr'; all are computed.
    loss: of the model and a batch, in place of the output's own. It gives the losses of the
        examples ``(B,)``, the loss and what the sum over examples was divided by, or a scalar. Of
        a scalar the divisor is measured on the first batch; an example's loss is the sum over
        its labels that count.
    terms, biases: candidates; of a set of terms, as in ``prepare``, each entry is one. By default
        every term with a bias and, where neither query, key nor value has one, these three, with
        biases of zeros for the time of the run. Dead terms are found before the run and stay out
        of it, unless ``terms`` names them.
    epochs, steps: length of the run; ``steps`` wins. lr: constant after the share ``warmup`` of
        the run. max_grad_norm: clips the global gradient norm. The authors train with a
        constant rate of 1e-4 to 1e-3 by task, without warm-up, clipped to 1, in
        batches of 16, for 16 to 60 epochs.
    settle: end the run as soon as the first term by ``method`` ('beft' or 'magnitude') would be
        another by chance with at most this probability; 0: never. See ``settling.py``.
    The task head (whatever is outside ``model.base_model``) trains beside the biases.
    The model comes back as it was: weights, ``requires_grad``, training mode, hooks, also after
    Ctrl-C. The same seed gives the same selection to the bit on one machine.
    Raises SelectionError for a non-finite loss or gradient (it names the step), a loss whose
    divisor cannot be measured, a model over several processes or devices, an empty loader, an
    unknown method or term; BiasError where the model has no such biases; ProbeError where an
    attention cannot be probed for dead terms.
    Source: Huang et al. 2025 (arXiv 2509.15974); docs/definitions.md.
    """
    if method not in scores.METHODS:
        raise SelectionError(
            f"unknown method '{method}': choose one of {', '.join(scores.METHODS)}"
        )
    _check_settle(settle, method)
    model = whole(model, SelectionError, copies=False)
    require_untapped(model)
    names, added = _candidates(model, terms, biases)
    schedule = _schedule(loader, epochs, steps)
    with (
        ModelSnapshot(model),
        _added(model, added),
        torch.random.fork_rng(devices=cuda_devices(model)),
    ):
        torch.manual_seed(seed)
        batches = BufferedLoader(loader)
        if batches.first is None:
            raise SelectionError("the loader is empty: select needs at least one batch")
        dead = _dead(model, loss, names, batches.first)
        alive = [b for b in names if terms is not None or names[b] not in dead]
        with Tap(model, alive) as tap:
            run = Run(
                model,
                tap,
                loss=loss,
                steps=schedule,
                lr=lr,
                warmup=warmup,
                weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
            )
            enough = Settling(method, settle, names) if settle else None
            losses = run.train(batches, progress, enough)
            return _judge(run, names, method, dead, losses)


def _check_settle(settle: float, method: str) -> None:
    if not 0 <= settle < 0.5:
        raise SelectionError(f"settle is a probability from 0 to below 0.5, but is {settle}")
    if settle and method not in SETTLING:
        raise SelectionError(
            f"whether a ranking by '{method}' is settled is not known: use "
            f"{' or '.join(SETTLING)}, or settle=0"
        )


def _candidates(
    model: nn.Module, terms: str | Iterable[str] | None, biases: BiasMap | None
) -> tuple[dict[Bias, str], list[Bias]]:
    """Each bias that competes with the name it counts for; and those that the model lacks."""
    have, lack = list(biases or ()), []
    if biases is None:
        projections = find_projections(model)
        have = list(find_biases(model)) if any(p.has_bias for p in projections) else []
        lack = [p.bias for p in projections if p.linear and not p.has_bias]
    if terms is None:
        attention = [b for b in lack if b.term.removeprefix("cross_") in QKV]
        lack = [] if any(b.term in QKV for b in have) else attention
        names = {b: b.term for b in (*have, *lack)}
    else:
        try:
            names = pick([*have, *lack], terms)
        except BiasError as error:
            raise SelectionError(str(error)) from error
    return {b: names[b] for b in BiasMap(names)}, [b for b in lack if b in names]


@contextmanager
def _added(model: nn.Module, biases: Sequence[Bias]) -> Iterator[None]:
    """Biases of zeros where the model has none, for the time of a run."""
    modules = [model.get_submodule(path) for path in dict.fromkeys(b.module for b in biases)]
    try:
        for module in modules:
            add_bias(module)
        yield
    finally:
        for module in modules:
            module.bias = None  # type: ignore[assignment]


def _dead(model: nn.Module, loss: Loss, names: Mapping[Bias, str], batch: Batch) -> list[str]:
    """Names of dead terms, told by four examples."""
    device = model.get_parameter(next(iter(names)).parameter).device
    inputs, rows = on_device(batch, device), rows_of(batch)
    first_four = {
        k: v[:4] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
        for k, v in inputs.items()
    }
    model.eval()
    dead = dead_terms(model, names, lambda: loss(model, first_four))
    return list(dict.fromkeys(name for b, name in names.items() if b.term in dead))


def _judge(
    run: Run, names: Mapping[Bias, str], method: str, dead: list[str], losses: list[float]
) -> Selection:
    statistics, current, initial = run.tap.statistics(), run.current(), dict(run.initial)
    for bias in names:  # dead ones stayed out of the run: there they are as they were
        if bias not in current:
            value = bias.read(run.model.get_parameter(bias.parameter))
            initial[bias] = current[bias] = value
            statistics[bias] = (torch.zeros_like(value), torch.zeros_like(value))
    per_layer: dict[str, dict[str, list[float]]] = {m: {} for m in scores.METHODS}
    undefined: dict[str, str] = {}
    obtuse: list[str] = []
    for bias in names:
        b0, b, (total, squares) = initial[bias], current[bias], statistics[bias]
        values = {
            "beft": scores.beft_score(b0, b),
            "magnitude": scores.magnitude(b0, b),
            "fisher": run.batch_sq.get(bias, 0.0) / run.done,
            "example_fisher": scores.fisher(squares, run.examples),
            "snr": scores.signal_to_noise(total, squares, run.examples),
        }
        for name, value in values.items():
            per_layer[name].setdefault(names[bias], []).append(value)
        if math.isnan(values["beft"]):
            where = "initial" if not bool(b0.any()) else "trained"
            undefined[names[bias]] = f"the {where} bias is zero in layer {bias.layer}"
        elif values["beft"] > 1:
            obtuse.append(bias.name)
    means = {m: {t: sum(v) / len(v) for t, v in terms.items()} for m, terms in per_layer.items()}
    return Selection(
        method=method,
        scores=means,
        per_layer=per_layer,
        ranking={m: _rank(values, dead) for m, values in means.items()},
        undefined=undefined,
        dead=dead,
        obtuse=obtuse,
        losses=losses,
        steps=run.steps,
        initial={b.name: t.cpu() for b, t in initial.items()},
        current={b.name: t.cpu() for b, t in current.items()},
    )


def _rank(values: dict[str, float], dead: list[str]) -> list[str]:
    alive = [t for t, v in values.items() if t not in dead and not math.isnan(v)]
    return sorted(alive, key=lambda t: -values[t])


def _schedule(loader: Iterable[Any], epochs: int, steps: int | None) -> int:
    if steps is None:
        if not hasattr(loader, "__len__"):
            raise SelectionError("a loader without a length needs steps=...")
        steps = epochs * len(loader)  # type: ignore[arg-type]
    if steps < 1:
        raise SelectionError("nothing to train on: the loader is empty or epochs and steps are 0")
    return steps
