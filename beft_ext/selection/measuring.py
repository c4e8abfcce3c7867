"""``measure_gains``: what each term alone would explain, told before any training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import nn

from beft_ext import parallel
from beft_ext.gains import Gain, GainError, Gram, beyond_chance, gain, lead, learning_curve
from beft_ext.models import Bias, BiasMap
from beft_ext.models.modes import quiet
from beft_ext.models.wrappers import joint, whole
from beft_ext.parallel import Ranks
from beft_ext.progress import Count
from beft_ext.selection.candidates import added, candidates_of, dead_of
from beft_ext.selection.equations import number_of
from beft_ext.selection.evidence import Collector, Evidence, Observe, apart
from beft_ext.selection.gain_result import MARGIN, SURE, Gains
from beft_ext.selection.result import SelectionError
from beft_ext.selection.run import (
    BufferedLoader,
    ModelSnapshot,
    require_parts,
    require_same,
)
from beft_ext.selection.sets import frontier
from beft_ext.tap import Tap, require_untapped
from beft_ext.training.data import generators, length_of, set_epoch
from beft_ext.training.joined import require_apart
from beft_ext.training.lockstep import in_step
from beft_ext.training.loss import (
    Batch,
    Loss,
    first_rows,
    model_loss,
    offsets_of,
    on_device,
    rows_of,
)
from beft_ext.training.observed import Observed, model_observe

LOOKS = (0.25, 0.5, 1.0)  # parts of the examples at which the pass may end
EXAMPLES = 1000  # that are read, at most
FIRST_LOOK = 250  # examples that a pass needs to end early
FLIPS = 199
PARTS = (4, 2)  # of the examples, for the learning curve


def measure_gains(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    observe: Observe = model_observe,
    terms: str | Iterable[str] | None = None,
    biases: BiasMap | None = None,
    examples: int = EXAMPLES,
    memory: float = 2**31,
    groups: str | None = None,
    parts: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Gains:
    """Tell what each bias term alone would explain of unseen loss, before any training.

    One forward and backward over at most ``examples`` examples, in evaluation mode, at the initial
    biases. The pass ends at a quarter or half of them, from 250 on, where the first term is sure
    by then at a third of the risk. The model comes back as it was.

    In a process group all ranks call it, each with rows of its own; all get the same gains, those
    of one process over all rows (docs/large-models.md).

    Args:
        model: a transformers model, plain, compiled, in DistributedDataParallel or under
            ``fully_shard``.
        loader: batches as keyword arguments of the model, first axis examples. An empty one is a
            step without rows on this rank.
        observe: the losses of a batch's examples; by default told by the model's own loss.
        terms: the candidates: each entry of a set of terms, as for ``prepare``, is one. By
            default every term that has a bias or could be given one, without the dead ones.
        biases: the biases that the candidates come from; by default those of every known
            projection.
        examples: to read, at most.
        memory: bytes that the gradients may take in a process. Where they need more, biases are
            folded.
        groups: key of the batches whose values, one an example, say which examples belong
            together (a passage, a user); the model is not given it. A group is left out as a
            whole. Equal texts are left out together in any case.
        parts: that each batch is read in, one after another, in less memory.
        seed: of the folding, the directions that are drawn of many classes, the sign flips and
            the learning curve.
        progress: show how many examples are read, on stderr: a bar, and lines in a log file.
    Returns:
        The gains of terms, bands of layers and sets, with their errors.
    Raises:
        GainError: the examples tell nothing (fewer than 3 that differ, all labels the same); a
            loss or gradient is not finite (the message names the example); the gradients do not
            fit the memory; the batches lack ``groups``.
        LossError: the batches have no labels or no tensor; or the losses of single examples
            cannot be told from the model's loss.
        SelectionError: an empty loader; batches that are no mappings; an unknown term; a bias of
            another model; a model that is spread over processes.
        ProbeError: an attention cannot be probed for dead terms.
        TapError: the model is tapped already, or the examples cannot be told apart in an output.
        RankError: a rank ended or fell silent.
    Example:
        >>> import beft_ext
        >>> gains = beft_ext.measure_gains(model, loader, terms="value+mlp_up")
        >>> sorted(gains.ranking), gains.examples
        (['mlp_up', 'value'], 12)
    Source: docs/definitions.md, section 7; the kernel of gradients is that of Malladi et al. 2023
    (arXiv 2210.05643).
    """
    if examples < 3:
        raise GainError(f"a gain needs at least 3 examples, but only {examples} are to be read")
    with parallel.meeting("measure_gains", joint(model)) as ranks:
        model = whole(model, SelectionError, copies=False, replicas=True)
        require_untapped(model)
        require_parts(model, parts)
        names, lacking = candidates_of(model, terms, biases, every=True)
        require_same(ranks, model, candidates=repr((names, examples, memory, groups, seed)))
        with ModelSnapshot(model), in_step(model, ranks), added(model, lacking), quiet(model):
            torch.manual_seed(seed)
            batches = BufferedLoader(loader)
            require_apart(ranks, batches.first, SelectionError)
            examples = _length(loader, examples, ranks)
            first, _ = apart(batches.first, groups)
            dead = ranks.first(dead_of(model, observe, names, first))
            each = ranks.first(_rows_of_an_example(model, observe, names, first))
            alive = {b: name for b, name in names.items() if name not in dead or terms is not None}
            if not alive:
                raise GainError("every candidate term is dead: no bias could be trained")
            model.requires_grad_(False)
            with Tap(model, alive) as tap:
                collector = Collector(
                    model, tap, alive, observe, examples, memory, seed, ranks, groups, each, parts
                )
                shown = progress and ranks.rank == 0
                with collector.listening(), Count("gains", examples, shown) as count:
                    named = [t for t in dead if terms is None]
                    return _looked(collector, _counted(batches, collector, count), named, seed)


def observed_by(loss: Loss) -> Observe:
    """What tells the losses of single examples where ``loss`` does: by itself, or through the
    model's own."""
    if loss is model_loss:
        return model_observe

    def observe(model: nn.Module, batch: Batch) -> Observed:
        value = loss(model, batch)
        if isinstance(value, tuple) or value.ndim != 1:
            raise GainError(
                "the gains need the losses of single examples: let the loss return them (B,), pass "
                "observe=..., or choose another method"
            )
        return Observed(value, torch.ones_like(value))

    return observe


@contextmanager
def read_again(loader: Iterable[Batch], once: bool) -> Iterator[None]:
    """While a loader is read for the first of two times; the second finds it as the first did.

    Raises SelectionError for one that can be read once, unless that is enough.
    """
    if not once and iter(loader) is loader:
        raise SelectionError(
            "this loader can be read once, but gains and run read it each: pass one that can be "
            "read again, or steps=0 for the gains alone"
        )
    own = [(g, g.get_state()) for g in generators(loader)]
    yield
    for generator, state in own:
        generator.set_state(state)
    set_epoch(loader, 0)


def _length(loader: Iterable[Batch], most: int, ranks: Ranks) -> int:
    """How many examples all ranks have, ``most`` at most, so that no memory lies idle."""
    lengths = ranks.gather(_own_length(loader, most))
    return min(most, sum(lengths))


def _own_length(loader: Iterable[Batch], most: int) -> int:
    if isinstance(own := getattr(loader, "examples", None), int):
        return own
    # A DistributedSampler has this rank's rows alone.
    for held in (getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        if (length := length_of(held)) is not None:
            return length
    if isinstance(loader, Sequence) and not any(b and offsets_of(b) is not None for b in loader):
        return sum(rows_of(b) for b in loader if b)
    return most


@torch.no_grad()
def _rows_of_an_example(
    model: nn.Module, observe: Observe, names: Mapping[Bias, str], batch: Batch
) -> int:
    """Told by a batch's first examples."""
    device = model.get_parameter(next(iter(names)).parameter).device
    inputs = on_device(batch, device)
    alone = inputs if offsets_of(inputs) is not None else first_rows(inputs, 4)
    return number_of(observe(model, alone))


def _counted(batches: Iterable[Batch], collector: Collector, count: Count) -> Iterator[Batch]:
    for batch in batches:
        count.to(collector.total)
        yield batch


def _looked(collector: Collector, batches: Iterator[Batch], dead: list[str], seed: int) -> Gains:
    """Read and look, until a term is sure or the examples end."""
    ranks = collector.ranks
    for part in LOOKS:
        more = collector.read(batches, math.ceil(part * collector.examples))
        last = part == 1.0 or not more
        if last or collector.total >= FIRST_LOOK:
            evidence = collector.evidence()
            grams, found = _of_terms(evidence, ranks)
            if last or ranks.first(_settled(found)):
                break
    gains = _gains_of(evidence, grams, found, dead, collector.columns is not None, seed, ranks)
    return replace(ranks.first(gains), evidence=evidence)


def _of_terms(evidence: Evidence, ranks: Ranks) -> tuple[dict[str, Gram], dict[str, Gain]]:
    """The gains of all terms, and the factors of those that this rank was asked for: they are as
    large as all rows' products, and stay here."""
    grams: dict[str, Gram] = {}

    def told(term: str) -> Gain:
        grams[term] = Gram.of(evidence.of_term(term))
        return gain(grams[term], evidence.regression)

    return grams, dict(zip(evidence.grams, ranks.map(told, evidence.grams), strict=True))


def _settled(found: dict[str, Gain]) -> bool:
    """Whether the first leads each rival by its margin, at a third of the risk."""
    first = max(found, key=lambda t: found[t].value)
    rivals = [t for t in found if t != first]
    risk = (1 - SURE) / 3 / max(1, len(rivals))
    quantile = NormalDist().inv_cdf(1 - risk)
    leads = (lead(found[first], found[t]) for t in rivals)
    return all(ahead + MARGIN > quantile * error for ahead, error in leads)


def _gains_of(
    evidence: Evidence,
    grams: dict[str, Gram],
    found: dict[str, Gain],
    dead: list[str],
    folded: bool,
    seed: int,
    ranks: Ranks,
) -> Gains:
    """Every figure, from the Gram matrices alone; what takes long is shared by the ranks."""
    regression, each = evidence.regression, ranks.map
    ranking = sorted(found, key=lambda t: -found[t].value)
    first = ranking[0]
    elements = {t: sum(sizes.values()) for t, sizes in evidence.elements.items()}
    matrices = {(t, b): k for t in ranking for b, k in evidence.grams[t].items()}
    if evidence.head is not None:
        matrices["", (0, 0)] = evidence.head
    values = each(lambda k: gain(Gram.of(k), regression).value, matrices.values())
    alone = dict(zip(matrices, values, strict=True))
    chances = beyond_chance(grams, found, regression, FLIPS, seed, each)
    return Gains(
        ranking=ranking,
        values={t: found[t].value for t in ranking},
        errors={t: found[t].error for t in ranking},
        chance=chances,
        leads={t: lead(found[first], found[t]) for t in ranking[1:]},
        bands={t: {b: alone[t, b] for b in evidence.grams[t]} for t in ranking},
        steps={t: found[t].step / elements[t] ** 0.5 for t in ranking},
        elements={t: elements[t] for t in ranking},
        curve=learning_curve(evidence.of_term(first), regression, PARTS, seed, each)
        | {len(regression.blocks): found[first].value},
        head=alone.get(("", (0, 0))),
        frontier=frontier(evidence, {t: found[t].ridge for t in ranking}, seed, each),
        dead=dead,
        examples=evidence.examples,
        folded=folded,
    )
