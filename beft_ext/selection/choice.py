"""What ``--terms auto`` trains, and why: the gains and a prior, weighed by their errors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import NormalDist, fmean

from beft_ext.selection.gain_result import MARGIN, SURE, Gains
from beft_ext.selection.result import SelectionError


@dataclass(frozen=True)
class Prior:
    """What is known of a kind of model before its data are seen.

    Attributes:
        means: by how much a term explains more than the mean of all terms, in units of gain;
            0 for a term that is not named.
        spread: standard deviation of this from one data set to another.
        evidence: where it is from, for the printed reason.
        first: the term to train where the data tell nothing.
    """

    means: Mapping[str, float]
    spread: float
    evidence: str
    first: str = "value"


# Fitted to the study's cells by benchmarks/study_prior.py; where nothing was studied, the spread is
# wide.
PRIORS = {
    "encoder": Prior(
        {
            "mlp_up": 0.05,
            "attention_norm": 0.01,
            "attention_output": 0.01,
            "value": -0.01,
            "query": -0.06,
        },
        0.02,
        "10 cells of an encoder with 250 examples and more",
        "mlp_up",
    ),
    "other": Prior({}, 0.2, "no study"),
}


@dataclass(frozen=True)
class Choice:
    """A term, and why.

    Attributes:
        term: what should train.
        confidence: probability that no rival explains more by ``MARGIN`` of gain or more.
        reason: a sentence that says what the gains and the prior said.
    """

    term: str
    confidence: float
    reason: str

    @property
    def sure(self) -> bool:
        """Whether ``confidence`` is at least 0.95."""
        return self.confidence >= SURE


def automatic(
    gains: Gains, family: str, budget: int | None = None, merging: Collection[str] = ()
) -> Choice:
    """The term to train; or a set within a budget, from the frontier, by its gain alone.

    Args:
        family: a key of ``PRIORS``; another one has the widest prior.
        budget: number of parameters that the biases may have, at most.
        merging: terms that merge into the plain model.

    Raises:
        SelectionError: no set is small enough.
    """
    if budget is not None:
        return _affordable(gains, budget)
    return weighed(gains, PRIORS.get(family, PRIORS["other"]), merging)


def weighed(gains: Gains, prior: Prior, merging: Collection[str] = ()) -> Choice:
    """The term whose gain is largest once the prior is weighed in.

    Both are normal: the gain of a term, less the mean of all, with its paired error, and the
    prior. A tie, of terms that are behind by less than the error and by ``MARGIN`` at most, goes
    to a term that merges, then to the smallest one.
    """
    posterior = {t: _above_mean(gains, t, prior) for t in gains.ranking}
    largest = max(posterior, key=lambda t: posterior[t].mean)
    tied = [t for t in posterior if _ties(posterior[largest], posterior[t])]
    first = max(
        tied,
        key=lambda t: (_name(t) in merging, -gains.elements.get(t, 0), posterior[t].mean),
    )
    doubts = (
        1 - (rival - posterior[first]).cdf(MARGIN) for t, rival in posterior.items() if t != first
    )
    confidence = max(0.0, 1 - sum(doubts))
    said = f"its gain is {gains.values[first]:.3f} ± {gains.errors[first]:.3f}"
    if first != largest:
        why = (
            "merges" if _name(largest) not in merging and _name(first) in merging else "is smaller"
        )
        said += f", that of '{largest}' {gains.values[largest]:.3f} is no larger for certain, and "
        said += f"'{first}' {why}"
    elif first != gains.best:
        best = gains.best
        said += f", that of '{best}' {gains.values[best]:.3f} ± {gains.errors[best]:.3f}"
        said += f", but {prior.evidence} speak for '{first}'"
    verdict = "sure" if confidence >= SURE else "not sure"
    reason = (
        f"{said} ({gains.examples} examples; {verdict}: no rival explains {MARGIN} more with "
        f"probability {confidence:.2f})"
    )
    return Choice(first, confidence, reason)


def by_prior(terms: Collection[str], family: str, why: str) -> Choice:
    """The term to train where no gain can be told.

    Args:
        terms: those that the model has or could be given.
        family: as for ``automatic``.
        why: the gains' own sentence.
    """
    prior = PRIORS.get(family, PRIORS["other"])
    term = prior.first if prior.first in terms else next(iter(terms))
    return Choice(term, 0.0, f"the data do not tell ({why}); the prior is from {prior.evidence}")


def _affordable(gains: Gains, budget: int) -> Choice:
    """The set of the frontier that explains most for at most so many parameters."""
    sets = gains.frontier or [(t, gains.elements[t], gains.values[t]) for t in gains.ranking]
    within = [entry for entry in sets if entry[1] <= budget]
    if not within:
        name, size, _ = min(sets, key=lambda entry: entry[1])
        raise SelectionError(
            f"no set of biases has {budget:,} parameters or fewer: the smallest that was measured "
            f"is '{name}' with {size:,}"
        )
    name, size, told = max(within, key=lambda entry: entry[2])
    reason = f"its gain is {told:.3f}, the largest of sets with {budget:,} parameters or fewer"
    return Choice(name, gains.confidence, f"{reason}; it has {size:,} ({gains.examples} examples)")


def _ties(first: NormalDist, rival: NormalDist) -> bool:
    """Whether a rival is behind by no more than the error of that, and by a margin at most."""
    return first.mean - rival.mean <= min(MARGIN, (first - rival).stdev)


def _name(entry: str) -> str:
    return entry.partition("@")[0]


def _above_mean(gains: Gains, term: str, prior: Prior) -> NormalDist:
    """What a term explains more than the mean of all terms."""
    told = gains.values[term] - fmean(gains.values.values())
    # The error of a difference of two terms holds both of theirs.
    errors = [error for _, error in gains.leads.values()] or [gains.errors[term]]
    error = gains.leads[term][1] if term in gains.leads else fmean(errors)
    error = max(error / 2**0.5, 1e-9)
    mean = prior.means.get(_name(term), 0.0)
    precision, known = error**-2, prior.spread**-2
    return NormalDist(
        (told * precision + mean * known) / (precision + known), (precision + known) ** -0.5
    )
