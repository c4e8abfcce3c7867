"""What a pass over labelled examples found: the gains, as an object, a printed table, a record."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from statistics import NormalDist

from torch import Tensor

from beft_ext.files import JsonObject
from beft_ext.gains import GainError
from beft_ext.models.terms import parse_terms
from beft_ext.selection.evidence import Evidence

GAIN = "gain"  # among the methods that a ranking may go by
MARGIN = 0.02  # of gain: a rival that is better by less would not be missed
SURE = 0.95


@dataclass(frozen=True, repr=False)
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
        evidence: the Gram matrices and targets, from which all can be computed again; None for
            gains that were read from a file.
        best: the term with the largest gain. To read it where no term is ranked raises GainError.
        confidence: probability that no other term explains more by 0.02 of gain or more.
        sure: whether ``confidence`` is at least 0.95 and the first gain is beyond chance.
    Example:
        >>> import beft_ext
        >>> gains = beft_ext.measure_gains(model, loader, terms=["value", "mlp_up"])
        >>> gains.best == max(gains.values, key=gains.values.get)
        True
    Source: docs/definitions.md, section 7.
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
    evidence: Evidence | None = field(default=None, repr=False, compare=False)

    @property
    def best(self) -> str:
        """The term with the largest gain. Raises GainError where no term is ranked."""
        if not self.ranking:
            raise GainError("no term has a gain: every candidate was dead")
        return self.ranking[0]

    @property
    def confidence(self) -> float:
        """Probability that no other term explains more by ``MARGIN``, summed over the others."""
        doubts = [
            NormalDist().cdf((-MARGIN - ahead) / error) if error > 0 else 0.0
            for ahead, error in self.leads.values()
        ]
        return max(0.0, 1.0 - sum(doubts))

    @property
    def sure(self) -> bool:
        """Whether ``confidence`` is at least 0.95 and the first gain is beyond chance."""
        if not self.ranking:
            return False
        return self.confidence >= SURE and self.chance[self.best] <= 1 - SURE

    def __repr__(self) -> str:
        own = (f"{t} {self.values[t]:.3f}±{self.errors[t]:.3f}" for t in self.ranking[:3])
        first = " > ".join(own) or "no term is ranked"
        dead = f"dead: {', '.join(self.dead)}; " if self.dead else ""
        verdict = "sure" if self.sure else "not sure"
        return f"<Gains: {first}\n {dead}{verdict}, {self.examples} examples>"

    def __str__(self) -> str:
        width = max(24, *(1 + len(term) for term in [*self.ranking, *self.dead, ""]))
        lines = [
            f"{'':>4} {'term':<{width}}{'gain':>8}{'error':>8}{'chance':>8}{'elements':>10}"
            "  gain of layers alone"
        ]
        for place, term in enumerate(self.ranking, 1):
            layers = "  ".join(f"{a}-{b}: {g:.3f}" for (a, b), g in self.bands[term].items())
            lines.append(
                f"{place:>3}. {term:<{width}}{self.values[term]:>8.3f}{self.errors[term]:>8.3f}"
                f"{self.chance[term]:>8.3f}{self.elements[term]:>10,}  {layers}"
            )
        lines += [f"{'-':>4} {term:<{width}}{'dead':>8}" for term in self.dead]
        if not self.ranking:
            return "\n".join([*lines, "no term is ranked"])
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
            lines.append("sets, by number of parameters, with gain and relative time of a step:")
            lines += [
                f"{n:>12,}  {g:>6.3f}  {self.step_time(name):>4.2f}  {name}"
                for name, n, g in self.frontier
            ]
        return "\n".join(lines)

    def step_time(self, terms: str) -> float:
        """About how long a training step takes, relative to one that trains the lowest layer.

        A backward ends at the lowest layer that trains, and one that gives no gradients of weights
        takes as long as the forward of the same layers.

        Args:
            terms: a set of ``frontier``.
        """
        every = [band for own in self.bands.values() for band in own]
        bottom, top = min(first for first, _ in every), max(last for _, last in every)
        entries = parse_terms(terms)
        lowest = min(min(self.bands[e.term])[0] if e.last is None else e.first for e in entries)
        return 1 - (lowest - bottom) / (2 * (top + 1 - bottom))

    def record(self) -> JsonObject:
        """For JSON; ``Gains.of`` reads it."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "evidence"}
        bands = {t: {f"{a}-{b}": g for (a, b), g in own.items()} for t, own in self.bands.items()}
        curve = {str(n): g for n, g in self.curve.items()}
        said = {"confidence": self.confidence, "sure": self.sure}
        return named | {"bands": bands, "curve": curve} | said

    @classmethod
    def of(cls, record: JsonObject) -> Gains:
        """From a ``record``. Raises KeyError, TypeError or ValueError where it is none."""
        known = {f.name for f in fields(cls)} - {"evidence"}
        values = {name: record[name] for name in known}
        values["bands"] = {
            t: {(int(a), int(b)): g for at, g in own.items() for a, b in [at.split("-")]}
            for t, own in record["bands"].items()
        }
        values["curve"] = {int(n): g for n, g in record["curve"].items()}
        values["leads"] = {t: (a, e) for t, (a, e) in record["leads"].items()}
        values["frontier"] = [(name, n, g) for name, n, g in record["frontier"]]
        return cls(**values)

    def tensors(self) -> dict[str, Tensor]:
        """What all figures are computed from, by name; Gram matrices in fp32."""
        if self.evidence is None:
            return {}
        regression = self.evidence.regression
        found = {
            "targets": regression.targets,
            "prior": regression.prior.contiguous(),
            "groups": regression.groups,
        }
        if self.evidence.head is not None:
            found["gram/head"] = self.evidence.head.float()
        for term, own in self.evidence.grams.items():
            found |= {f"gram/{term}/{a}-{b}": k.float() for (a, b), k in own.items()}
        return found
