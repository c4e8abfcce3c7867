"""What can become of each term of a model: whether it is there, and where its adapter goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from beft_ext.adapters.contents import unsupported
from beft_ext.models import BiasMap, find_projections, mergeable, wrappers

LEGEND = (
    "merges: merge_adapter makes a plain model of it; PEFT: Hugging Face PEFT loads its adapter"
)


@dataclass(frozen=True)
class TermFacts:
    """One term of a model.

    Attributes:
        layers: number of layers that it is in.
        width, elements: of its first bias, and of all.
        added: whether the model has none in some layer, so that ``prepare`` adds it.
        merges: whether ``merge_adapter`` finds a place for it in a plain model.
        in_peft: whether Hugging Face PEFT loads its adapter.
        place: the first parameter, and which part of it.
    """

    term: str
    layers: int
    width: int
    elements: int
    added: bool
    merges: bool
    in_peft: bool
    place: str

    def __str__(self) -> str:
        bias = "could be added" if self.added else "own"
        merges, peft = ("yes" if fact else "no" for fact in (self.merges, self.in_peft))
        return (
            f"{self.term:<23}{self.layers:>6}{self.width:>7}{self.elements:>10}  {bias:<16}"
            f"{merges:<8}{peft:<6}{self.place}"
        )


def term_facts(model: nn.Module) -> list[TermFacts]:
    """The facts of each term that the model has or could be given.

    Raises BiasError where no attention projection is found.
    """
    model = wrappers.inside(model)
    places = [p for p in find_projections(model) if p.has_bias or p.linear]
    biases = BiasMap(p.bias for p in places)
    lacking: dict[str, list[str]] = {term: [] for term in biases.terms}
    for place in places:
        if not place.has_bias:
            lacking[place.bias.term].append(place.bias.module)
    merging = mergeable(model, lacking)
    facts = []
    for term in biases.terms:
        own = [b for b in biases if b.term == term]
        facts.append(
            TermFacts(
                term,
                layers=len({b.layer for b in own}),
                width=own[0].width,
                elements=sum(b.width for b in own),
                added=bool(lacking[term]),
                merges=term in merging,
                in_peft=unsupported(model, [b.module for b in own]) is None,
                place=biases.place(own[0]),
            )
        )
    return facts


def facts_table(facts: list[TermFacts]) -> str:
    """The facts as rows under a head, and what the columns mean."""
    head = f"{'term':<23}{'layers':>6}{'width':>7}{'elements':>10}  {'bias':<16}{'merges':<8}"
    return "\n".join([f"{head}{'PEFT':<6}first parameter", *map(str, facts), "", LEGEND])
