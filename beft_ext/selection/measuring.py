"""``measure_gains``: what each term alone would explain, told before any training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from statistics import NormalDist

from torch import nn

from beft_ext.gains import Gain, GainError, Gram, beyond_chance, gain, lead, learning_curve
from beft_ext.models import BiasMap
from beft_ext.models.modes import quiet
from beft_ext.models.wrappers import whole
from beft_ext.selection.candidates import added, candidates_of, dead_of
from beft_ext.selection.evidence import Collector, Evidence, Observe
from beft_ext.selection.result import SelectionError
from beft_ext.selection.run import BufferedLoader, ModelSnapshot
from beft_ext.selection.sets import frontier
from beft_ext.tap import Tap, require_untapped
from beft_ext.training.loss import Batch, model_observe, offsets_of, rows_of

LOOKS = (0.25, 0.5, 1.0)  # parts of the examples at which the pass may end
FLIPS = 199
PARTS = (4, 2, 1)  # of the examples, for the learning curve
MARGIN = 0.02  # of gain: a rival that is better by less would not be missed
SURE = 0.95


@dataclass(frozen=True)
class Gains:
    """What each term alone would explain of unseen examples' loss, to first order.

    Attributes:
        ranking: the terms, the largest gain first; dead ones left out.
        values, errors: each term's gain, at most 1, and its standard error.
        chance: probability that noise alone shows such a gain for some term.
        leads: by how much the first term explains more than each other, and the error of that.
        bands: the gain of a band of layers alone, by term and ``(first, last)``.
        steps: root mean square of the ridge regression's step for an element of the term's
            biases: how far training would move them.
        elements: number of the term's parameters.
        curve: the first term's gain had there been fewer examples, by their number.
        head: gain of the task head alone; None where it is not made of linear layers.
        frontier: sets of terms and bands as ``terms`` are written, each with its number of
            parameters and its gain; chosen on one half of the examples, told from the other.
        dead: terms whose gradient is zero whatever is learnt.
        examples: number of examples, N.
        folded: whether the gradients were folded to fit the memory.
        evidence: the Gram matrices and targets, from which all can be computed again.
    """

    ranking: list[str]
    values: dict[str, float]
    errors: dict[str, float]
    chance: dict[str, float]
    leads: dict[str, tuple[float, float]]
    bands: dict[str, dict[tuple[int, int], float]]
    steps: dict[str, float]
    elements: dict[str, int]
    curve: dict[int, float]
    head: float | None
    frontier: list[tuple[str, int, float]]
    dead: list[str]
    examples: int
    folded: bool
    evidence: Evidence = field(repr=False)

    @property
    def best(self) -> str:
        """The term with the largest gain."""
        return self.ranking[0]

    @property
    def confidence(self) -> float:
        """Probability that no other term explains more by ``MARGIN`` (Bonferroni over them)."""
        doubts = [
            NormalDist().cdf((-MARGIN - ahead) / error) if error > 0 else 0.0
            for ahead, error in self.leads.values()
        ]
        return max(0.0, 1.0 - sum(doubts))

    @property
    def sure(self) -> bool:
        """Whether ``confidence`` is at least 0.95 and the first gain is beyond chance."""
        return self.confidence >= SURE and self.chance[self.best] <= 1 - SURE

    def __str__(self) -> str:
        lines = [
            f"{'':>4} {'term':<24}{'gain':>8}{'error':>8}{'chance':>8}{'elements':>10}"
            "  gain of layers alone"
        ]
        for place, term in enumerate(self.ranking, 1):
            layers = "  ".join(f"{a}-{b}: {g:.3f}" for (a, b), g in self.bands[term].items())
            lines.append(
                f"{place:>3}. {term:<24}{self.values[term]:>8.3f}{self.errors[term]:>8.3f}"
                f"{self.chance[term]:>8.3f}{self.elements[term]:>10,}  {layers}"
            )
        lines += [f"{'-':>4} {term:<24}{'dead':>8}" for term in self.dead]
        verdict = "sure" if self.sure else "not sure"
        lines.append(
            f"{verdict}: with probability {self.confidence:.2f} no term explains more than "
            f"'{self.best}' by {MARGIN} or more ({self.examples} examples)"
        )
        if self.head is not None:
            lines.append(f"the task head alone: {self.head:.3f}")
        if len(self.curve) > 1:
            points = ", ".join(f"{n}: {g:.3f}" for n, g in self.curve.items())
            lines.append(f"'{self.best}' by number of examples: {points}")
        if self.frontier:
            lines.append("sets, by number of parameters:")
            lines += [f"{n:>12,}  {g:>6.3f}  {name}" for name, n, g in self.frontier]
        return "\n".join(lines)


def measure_gains(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    observe: Observe = model_observe,
    terms: str | Iterable[str] | None = None,
    biases: BiasMap | None = None,
    examples: int = 1000,
    memory: float = 2**31,
    seed: int = 0,
) -> Gains:
    """Tell, before any training, what each bias term alone would explain of unseen loss.

    One forward and backward over at most ``examples`` examples, in evaluation mode, at the initial
    biases. The pass ends at a quarter or half of them where the first term is sure by then, at a
    third of the risk. The model comes back as it was.

    Args:
        model: a transformers model; compiled or not.
        loader: batches as keyword arguments of the model, first axis examples.
        observe: the losses of a batch's examples; by default told by the model's own loss.
        terms, biases: candidates; by default every term with a bias and every one that could be
            given one. Dead terms are left out.
        examples: to read, at most.
        memory: bytes that the gradients may take. Where they need more, biases are folded.
        seed: of the folding, the sign flips and the learning curve.

    Returns:
        Gains: terms, bands of layers and sets, with errors.

    Raises:
        GainError: examples that tell nothing (fewer than 3, all labels the same), a loss that is
            no sum over examples, a gradient that is not finite (it names the example).
        SelectionError: an empty loader, an unknown term, a model over several devices.

    Source: docs/definitions.md; arXiv 2210.05643 for the kernel of gradients.
    """
    model = whole(model, SelectionError, copies=False)
    require_untapped(model)
    names, lacking = candidates_of(model, terms, biases, every=True)
    batches = BufferedLoader(loader)
    if batches.first is None:
        raise SelectionError("the loader is empty: gains need at least one batch")
    examples = min(examples, _length(loader, batches.first, examples))
    with ModelSnapshot(model), added(model, lacking), quiet(model):
        dead = dead_of(model, observe, names, batches.first)
        alive = {b: name for b, name in names.items() if name not in dead or terms is not None}
        if not alive:
            raise GainError("every candidate term is dead: no bias could be trained")
        model.requires_grad_(False)
        with Tap(model, alive) as tap:
            collector = Collector(model, tap, alive, observe, examples, memory, seed)
            with collector.listening():
                return _looked(collector, iter(batches), [t for t in dead if terms is None], seed)


def _length(loader: Iterable[Batch], first: Batch, most: int) -> int:
    """How many examples there are at most, so that no memory lies idle."""
    if not isinstance(loader, Sized) or offsets_of(first) is not None:
        return most
    return len(loader) * rows_of(first)


def _looked(collector: Collector, batches: Iterator[Batch], dead: list[str], seed: int) -> Gains:
    """Read and look, until a term is sure or the examples end."""
    for part in LOOKS:
        more = collector.read(batches, math.ceil(part * collector.examples))
        if part == 1.0 or not more:
            break
        if collector.rows >= 250:
            evidence = collector.evidence()
            _, found = _of_terms(evidence)
            if _settled(found):
                break
    return gains_of(collector.evidence(), dead, collector.columns is not None, seed)


def _of_terms(evidence: Evidence) -> tuple[dict[str, Gram], dict[str, Gain]]:
    grams = {term: Gram.of(evidence.of_term(term)) for term in evidence.grams}
    return grams, {term: gain(gram, evidence.regression) for term, gram in grams.items()}


def _settled(found: dict[str, Gain]) -> bool:
    """Whether the first leads each rival by its margin, at a third of the risk."""
    first = max(found, key=lambda t: found[t].value)
    rivals = [t for t in found if t != first]
    risk = (1 - SURE) / 3 / max(1, len(rivals))
    quantile = NormalDist().inv_cdf(1 - risk)
    leads = (lead(found[first], found[t]) for t in rivals)
    return all(ahead + MARGIN > quantile * error for ahead, error in leads)


def gains_of(evidence: Evidence, dead: list[str], folded: bool, seed: int) -> Gains:
    """Every figure, from the Gram matrices alone."""
    regression = evidence.regression
    grams, found = _of_terms(evidence)
    ranking = sorted(found, key=lambda t: -found[t].value)
    first = ranking[0]
    elements = {t: sum(sizes.values()) for t, sizes in evidence.elements.items()}
    chances = beyond_chance(list(grams.values()), list(found.values()), regression, FLIPS, seed)
    return Gains(
        ranking=ranking,
        values={t: found[t].value for t in ranking},
        errors={t: found[t].error for t in ranking},
        chance=dict(zip(grams, chances, strict=True)),
        leads={t: lead(found[first], found[t]) for t in ranking[1:]},
        bands={
            t: {b: gain(Gram.of(k), regression).value for b, k in evidence.grams[t].items()}
            for t in ranking
        },
        steps={t: found[t].step / elements[t] ** 0.5 for t in ranking},
        elements={t: elements[t] for t in ranking},
        curve=learning_curve(evidence.of_term(first), regression, PARTS, seed),
        head=None if evidence.head is None else gain(Gram.of(evidence.head), regression).value,
        frontier=frontier(evidence, {t: found[t].ridge for t in ranking}, seed),
        dead=dead,
        examples=evidence.examples,
        folded=folded,
        evidence=evidence,
    )
