"""``select``: one short run of all candidate terms, and every score from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean

import torch
from torch import nn

from beft_ext import parallel, scores
from beft_ext.models import Bias, BiasMap
from beft_ext.models.modes import cuda_devices, repeatable
from beft_ext.models.wrappers import joint, name_of, whole
from beft_ext.selection.candidates import added, candidates_of, dead_of
from beft_ext.selection.evidence import Observe
from beft_ext.selection.gain_result import GAIN, Gains
from beft_ext.selection.measuring import measure_gains, observed_by, read_again
from beft_ext.selection.result import Selection, SelectionError
from beft_ext.selection.run import (
    BufferedLoader,
    ModelSnapshot,
    Run,
    require_parts,
    require_same,
)
from beft_ext.tap import Tap, require_untapped
from beft_ext.training.data import length_of
from beft_ext.training.joined import require_apart
from beft_ext.training.lockstep import in_step
from beft_ext.training.loss import Batch, Loss, LossError, model_loss


def select(
    model: nn.Module,
    loader: Iterable[Batch],
    method: str = GAIN,
    *,
    loss: Loss = model_loss,
    observe: Observe | None = None,
    terms: str | Iterable[str] | None = None,
    biases: BiasMap | None = None,
    groups: str | None = None,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 1e-3,
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    parts: int = 1,
    seed: int = 0,
    deterministic: bool = False,
    progress: bool = False,
) -> Selection:
    """Find out which bias term to train: by gains, before any training, and by one short run.

    The gain (``measure_gains``) says what a term would explain alone. The run trains all candidate
    terms together, the task head (what is outside ``model.base_model``) beside them, and scores
    how far each moves: the BEFT score, magnitude and Fisher information.

    Afterwards the model is as it was: weights, ``requires_grad``, training mode and hooks. This
    holds after Ctrl-C and after an error too. The same seed on the same machine gives the same
    bits; on a GPU with ``deterministic``.

    In a process group all ranks call it, each with rows of its own; all get the same selection to
    the bit, that of one process over all rows (docs/large-models.md).

    Args:
        model: a transformers model whose output has ``loss``, plain, compiled, in
            DistributedDataParallel or under ``fully_shard``.
        loader: batches, keyword arguments of the model whose first axis holds the examples. Each
            text of a packed batch (``position_ids`` that start anew, or ``cu_seq_lens_q``) is an
            example. An empty batch is a step without rows on this rank.
        method: what the ranking goes by: 'gain', for which the gains are measured, or one of the
            run's scores, which are computed in any case: 'beft', 'magnitude', 'fisher',
            'example_fisher' or 'snr'.
        loss: takes the model and a batch; by default it is the output's ``loss``. It gives the
            losses of the examples ``(B,)``, or a scalar and the number that the sum over the
            examples was divided by, or a scalar alone. For a scalar alone that number is
            measured on the first batch.
        observe: the losses of a batch's examples, for the gains; by default told by ``loss``.
        terms: the candidates: each entry of a set of terms, as for ``prepare``, is one. By
            default every term that has a bias, without the dead ones; where neither query, key
            nor value has one, these three join, with biases of zeros for the time of the run. For
            the gains every term that could be given biases joins.
            Dead terms that are named here take part in the run, but are not ranked.
        biases: the biases that the candidates come from, such as
            ``find_biases(model, names=...)``; by default those of every known projection.
        groups: key of the batches that says which examples belong together, as for
            ``measure_gains``; the run leaves it out.
        epochs: passes over the loader; without effect where ``steps`` is given.
        steps: number of training steps, the same on all ranks; by default ``epochs`` times the
            loader's length, the longest of all ranks'. 0 for the gains alone.
        lr: learning rate after the warm-up, constant. The authors take 1e-4 to 1e-3 by task.
        warmup: fraction of the steps over which the rate rises linearly, in [0, 1].
        weight_decay: as in AdamW.
        max_grad_norm: the gradient's global norm is clipped to this; 0 for no clipping.
        parts: that each batch is read in, one after another: the same gains and steps in less
            memory, but for dropout's draws and rounding.
        seed: of the run's random numbers; the global random state is put back.
        deterministic: on a GPU, take torch's deterministic algorithms alone; it costs time.
        progress: show how far it is, on stderr: a bar, and lines in a log file.
    Returns:
        Gains, scores, rankings, and the biases before and after the run.
    Raises:
        SelectionError: an unknown method or term; a bias of another model; an empty loader, or
            one without a length where ``steps`` is not given; batches without labels or tensors; a
            loss of which the divisor or the examples' parts cannot be told; a loss or gradient
            that is not finite (the message names the step); a model that is spread over processes.
        GainError: the examples tell nothing, or ``loss`` gives none of single examples.
        BiasError: the model has no such biases, or its head is quantised.
        ProbeError: an attention cannot be probed for dead terms.
        TapError: the model is tapped already, or the examples cannot be told apart in an output.
        RankError: a rank ended or fell silent.
        OptimizerError: ``lr``, ``warmup``, ``weight_decay`` or ``max_grad_norm`` is out of range.
    Example:
        >>> import beft_ext
        >>> selection = beft_ext.select(model, loader, terms=["query", "value"])
        >>> sorted(selection.ranking["beft"]), sorted(selection.ranking["gain"])
        (['query', 'value'], ['query', 'value'])
    Source: Huang et al. 2025 (arXiv 2509.15974); docs/definitions.md.
    """
    if method != GAIN and method not in scores.SCORES:
        known = ", ".join([GAIN, *scores.SCORES])
        raise SelectionError(f"unknown method '{method}': choose one of {known}")
    gains_alone = method == GAIN and steps == 0
    meeting = parallel.meeting("select", joint(model))
    with meeting as ranks, _loss_told(), repeatable(deterministic):
        model = whole(model, SelectionError, copies=False, replicas=True)
        require_untapped(model)
        require_parts(model, parts)
        plan = (method, terms, groups, epochs, lr, warmup, weight_decay, max_grad_norm, seed)
        ranks.agree(SelectionError, steps=repr(steps), arguments=repr(plan))
        step_count = 0 if gains_alone else max(ranks.gather(_step_count(loader, epochs, steps)))
        if method == GAIN:
            observe = observe or observed_by(loss)
            with read_again(loader, gains_alone):
                gains = measure_gains(
                    model,
                    loader,
                    observe=observe,
                    terms=terms,
                    biases=biases,
                    parts=parts,
                    groups=groups,
                    seed=seed,
                    progress=progress,
                )
            if gains_alone:
                return replace(_of_gains(gains), model=name_of(model))
        names, lacking = candidates_of(model, terms, biases, every=False)
        require_same(ranks, model, candidates=repr(names))
        with (
            ModelSnapshot(model),
            in_step(model, ranks),
            added(model, lacking),
            torch.random.fork_rng(devices=cuda_devices(model)),
        ):
            torch.manual_seed(ranks.seed(seed))
            batches = BufferedLoader(loader, without=groups)
            require_apart(ranks, batches.first, SelectionError)
            dead = ranks.first(dead_of(model, loss, names, batches.first))
            alive = [b for b in names if terms is not None or names[b] not in dead]
            with Tap(model, alive) as tap:
                run = Run(
                    model,
                    tap,
                    loss=loss,
                    steps=step_count,
                    lr=lr,
                    warmup=warmup,
                    weight_decay=weight_decay,
                    max_grad_norm=max_grad_norm,
                    parts=parts,
                )
                losses = run.train(batches, progress)
                found = ranks.first(_judge(run, names, method, dead, losses))
    found = replace(found, model=name_of(model))
    return found if method != GAIN else _joined(found, gains)


@contextmanager
def _loss_told() -> Iterator[None]:
    """What is wrong with the batches' loss is wrong with the selection."""
    try:
        yield
    except LossError as error:
        raise SelectionError(str(error)) from error


def _of_gains(gains: Gains) -> Selection:
    """A selection without a run."""
    nothing = Selection(GAIN, {}, {}, {}, {}, gains.dead, [], [], 0, {}, {})
    return _joined(nothing, gains)


def _joined(found: Selection, gains: Gains) -> Selection:
    """The run's scores, and the gains as one more; a band's gain stands at each of its layers."""
    per_layer = {
        term: [value for (a, b), value in own.items() for _ in range(a, b + 1)]
        for term, own in gains.bands.items()
    }
    return replace(
        found,
        scores={GAIN: gains.values} | found.scores,
        per_layer={GAIN: per_layer} | found.per_layer,
        ranking={GAIN: gains.ranking} | found.ranking,
        gains=gains,
    )


def _judge(
    run: Run, names: Mapping[Bias, str], method: str, dead: list[str], losses: list[float]
) -> Selection:
    examples, statistics = run.counted()
    current, initial = run.current(), dict(run.initial)
    for bias in names:  # dead ones stayed out of the run: there they are as they were
        if bias not in current:
            value = bias.read(run.model.get_parameter(bias.parameter))
            initial[bias] = current[bias] = value
            statistics[bias] = (torch.zeros_like(value), torch.zeros_like(value))
    found: dict[str, dict[str, dict[int, list[float]]]] = {m: {} for m in scores.SCORES}
    undefined: dict[str, str] = {}
    obtuse: list[str] = []
    for bias in names:
        b0, b, (total, squares) = initial[bias], current[bias], statistics[bias]
        values = {
            "beft": scores.beft_score(b0, b),
            "magnitude": scores.magnitude(b0, b),
            "fisher": run.batch_sq.get(bias, 0.0) / run.done,
            "example_fisher": scores.fisher(squares, examples),
            "snr": scores.signal_to_noise(total, squares, examples),
        }
        for name, value in values.items():
            found[name].setdefault(names[bias], {}).setdefault(bias.layer, []).append(value)
        if math.isnan(values["beft"]):
            where = "initial" if not bool(b0.any()) else "trained"
            undefined[names[bias]] = f"the {where} bias is zero in layer {bias.layer}"
        elif values["beft"] > 1:
            obtuse.append(bias.name)
    per_layer = {
        m: {t: [fmean(own) for own in layers.values()] for t, layers in terms.items()}
        for m, terms in found.items()
    }
    means = {m: {t: fmean(v) for t, v in terms.items()} for m, terms in per_layer.items()}
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


def _step_count(loader: Iterable[Batch], epochs: int, steps: int | None) -> int:
    if steps is None:
        if (length := length_of(loader)) is None:
            raise SelectionError("a loader without a length needs steps=...")
        steps = epochs * length
    if steps % 1:
        raise SelectionError(f"epochs and steps must be whole numbers, but steps are {steps}")
    if steps < 1:
        raise SelectionError("nothing to train on: the loader is empty or epochs and steps are 0")
    return steps
