"""Sets of terms as text: ``value@6-11+query`` is the value in layers 6 to 11, and every query.

``+`` joins entries; an entry is a term, in all of its layers, in one (``value@3``) or in a range.
Layers count from 0, the encoder's first, as ``Bias.layer`` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, groupby

from beft_ext.models.bias_map import TERMS, Bias, BiasError, BiasMap

ENTRY = re.compile(r"[^@]*(?:@([0-9]{1,6})(?:-([0-9]{1,6}))?)?")


@dataclass(frozen=True)
class Selected:
    """An entry: a term in the layers from ``first`` to ``last``, by default in all of them."""

    term: str
    first: int = 0
    last: int | None = None

    def __str__(self) -> str:
        if self.last is None:
            return self.term
        return f"{self.term}@{self.first}" + (f"-{self.last}" if self.last > self.first else "")

    def holds(self, bias: Bias) -> bool:
        """Whether ``bias`` is of this term and in these layers."""
        inside = self.last is None or self.first <= bias.layer <= self.last
        return inside and bias.term == self.term

    def meets(self, other: Selected) -> bool:
        """Whether both hold a layer of the same term."""
        whole = self.last is None or other.last is None
        return self.term == other.term and (
            whole or max(self.first, other.first) <= min(self.last or 0, other.last or 0)
        )


def parse_terms(terms: str | Iterable[str]) -> tuple[Selected, ...]:
    """The entries of a set of terms, from its text or the texts of its parts.

    Raises BiasError for an unknown term, layers that are none, and entries that share a layer.
    """
    text = terms if isinstance(terms, str) else "+".join(terms)
    entries = tuple(dict.fromkeys(map(_entry, text.split("+"))))
    for one, other in combinations(entries, 2):
        if one.meets(other):
            raise BiasError(f"'{one}' and '{other}' share a layer: name each layer of a term once")
    return entries


def pick(biases: Iterable[Bias], terms: str | Iterable[str]) -> dict[Bias, str]:
    """Those of ``biases`` that are in a set of terms, each with the text of its entry.

    Raises BiasError as ``parse_terms`` does, and for an entry that ``biases`` have nothing of.
    """
    biases = list(biases)
    present, layers = BiasMap(biases).terms, 1 + max((b.layer for b in biases), default=-1)
    picked: dict[Bias, str] = {}
    for entry in parse_terms(terms):
        if entry.term not in present:
            raise BiasError(f"the model has no term '{entry.term}': it has {', '.join(present)}")
        if entry.last is not None and entry.last >= layers:
            raise BiasError(
                f"'{entry}' is out of range: the model has {layers} layers, 0 to {layers - 1}"
            )
        own = [b for b in biases if entry.holds(b)]
        if not own:
            there = sorted({b.layer for b in biases if b.term == entry.term})
            raise BiasError(
                f"'{entry}' has none of the layers of '{entry.term}', "
                f"which are {', '.join(map(str, there))}"
            )
        picked |= dict.fromkeys(own, str(entry))
    return picked


def spell(picked: Iterable[Bias], biases: Iterable[Bias]) -> tuple[str, ...]:
    """The entries that pick ``picked`` out of ``biases``, in the order of the terms."""
    wanted, found = set(picked), BiasMap(biases)
    entries: list[Selected] = []
    for term in found.terms:
        taken = {b.layer: b in wanted for b in found if b.term == term}
        if all(taken.values()):
            entries.append(Selected(term))
            continue
        for chosen, run in groupby(taken, key=lambda layer: taken[layer]):
            if chosen:
                first, *rest = run
                entries.append(Selected(term, first, (rest or [first])[-1]))
    return tuple(map(str, entries))


def _entry(text: str) -> Selected:
    term, found = text.partition("@")[0], ENTRY.fullmatch(text)
    if term not in TERMS:
        raise BiasError(f"unknown term '{term}': use {', '.join(TERMS)}")
    if found is None:
        raise BiasError(
            f"the layers of '{text}' cannot be read: write {term}, {term}@3 or {term}@6-11"
        )
    if found[1] is None:
        return Selected(term)
    first, last = int(found[1]), int(found[2] or found[1])
    if first > last:
        raise BiasError(f"'{text}' ends before it begins: write {term}@{last}-{first}")
    return Selected(term, first, last)
