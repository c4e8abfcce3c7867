"""Is the gain as sure as it says? Draws of examples, from the Gram matrices of many.

One pass over ``POOL`` examples of a task gives every term's Gram matrix. The gain of any draw of
them is told from its part of the matrix, without the model. What is true at N is taken from
all draws: a term's mean gain over disjoint draws of N. One line a task and N, in
benchmarks/results/study-sure.jsonl:

- ``sure``: draws whose first term is called sure; ``wrong``: those of them where a rival's true
  gain is larger by more than the margin;
- ``covered``: of all draws and pairs of terms, how often the true lead is within 1.96 times the
  stated error of the lead that is told, nominally 0.95; ``covered_firsts``: of the pairs with the
  first term, which is the first by luck as well;
- ``lost``: mean true gain that the first term lacks, against the truly best.

    python benchmarks/study_sure.py sst2 subj trec --data DIR
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
from study import JUDGING, MINILM, examples_of
from torch import Tensor

from beft_ext.commands import demo
from beft_ext.commands.loading import ModelSpec, classes_of
from beft_ext.files import whole_file
from beft_ext.gains import Gain, Gram, Regression, beyond_chance, gain, lead
from beft_ext.models.modes import quiet
from beft_ext.parallel import Ranks
from beft_ext.selection.candidates import candidates_of, dead_of
from beft_ext.selection.evidence import Collector, Evidence
from beft_ext.selection.gain_result import MARGIN, SURE, Gains
from beft_ext.tap import Tap
from beft_ext.tasks import subset

RESULTS = Path(__file__).resolve().parent / "results" / "study-sure.jsonl"
POOL, POOL_OF_MANY = 3000, 2000  # examples; those of many classes take two rows each
SIZES, FLIPS, ERRORS = (100, 300), 99, 1.96
Draw = dict[str, Gain]


def pool(task: str, data: Path | None) -> Evidence:
    """Of many rows, by MiniLM."""
    kind, train, _ = examples_of(task, data)
    most = POOL if classes_of(train) == 2 else POOL_OF_MANY
    rows = subset(train, min(most, len(train)), 0)
    model, objective = ModelSpec(str(demo.minilm())).load(kind, classes_of(rows))
    batches = objective.training(rows, JUDGING, 0, by_length=True)
    names, _ = candidates_of(model, None, None, every=True)
    with quiet(model):
        dead = dead_of(model, objective.observe, names, next(iter(batches)))
        model.requires_grad_(False)
        alive = {b: name for b, name in names.items() if name not in dead}
        with Tap(model, alive) as tap:
            reading = (model, tap, alive, objective.observe, len(rows), float(2**34), 0, Ranks())
            collector = Collector(*reading)
            with collector.listening():
                collector.read(iter(batches), len(rows))
                return collector.evidence()


def draws(examples: int, size: int, count: int) -> Iterator[Tensor]:
    """Examples of each of at least ``count`` draws; those of one shuffling are disjoint."""
    source = random.Random(0)
    order = list(range(examples))
    for _ in range(math.ceil(count / (examples // size))):
        source.shuffle(order)
        for at in range(0, examples - size + 1, size):
            yield torch.tensor(order[at : at + size])


def coverage(evidence: Evidence, size: int, count: int) -> dict[str, float]:
    """What the draws of a size show."""
    matrices = {term: evidence.of_term(term) for term in evidence.grams}
    found: list[Draw] = []
    sure: list[bool] = []
    for drawn in draws(evidence.examples, size, count):
        rows = torch.isin(evidence.owners, drawn).nonzero().flatten()
        own = evidence.regression.part(rows)
        grams = {t: Gram.of(k[rows][:, rows]) for t, k in matrices.items()}
        told = {t: gain(gram, own) for t, gram in grams.items()}
        found.append(told)
        sure.append(_sure(grams, told, own))
    true = {t: fmean(draw[t].value for draw in found) for t in matrices}
    best = max(true.values())
    firsts = [max(draw, key=lambda t: draw[t].value) for draw in found]
    wrong = [best - true[t] > MARGIN for t in firsts]
    terms = list(true)
    every = [(a, b) for i, a in enumerate(terms) for b in terms[i + 1 :]]
    pairs = [_covers(draw, a, b, true) for draw in found for a, b in every]
    inside = [
        _covers(draw, first, t, true)
        for draw, first in zip(found, firsts, strict=True)
        for t in terms
        if t != first
    ]
    return {
        "draws": len(found),
        "sure": sum(sure),
        "wrong": sum(w and s for w, s in zip(wrong, sure, strict=True)),
        "wrong_of_all": sum(wrong),
        "covered": fmean(pairs),
        "covered_firsts": fmean(inside),
        "lost": fmean(best - true[t] for t in firsts),
    }


def _covers(draw: Draw, one: str, other: str, true: dict[str, float]) -> bool:
    """Whether the true lead of one term over another is within the told error."""
    ahead, error = lead(draw[one], draw[other])
    return abs(ahead - (true[one] - true[other])) <= ERRORS * error


def _sure(grams: dict[str, Gram], told: Draw, regression: Regression) -> bool:
    """As ``Gains.sure`` says it."""
    ranking = sorted(told, key=lambda t: -told[t].value)
    empty: dict[str, object] = {name: {} for name in ("bands", "steps", "elements", "curve")}
    made = Gains.of(
        empty
        | {"ranking": ranking, "values": {}, "errors": {}, "chance": dict.fromkeys(ranking, 0.0)}
        | {"leads": {t: lead(told[ranking[0]], told[t]) for t in ranking[1:]}}
        | {"head": None, "frontier": [], "dead": [], "examples": 0, "folded": False}
    )
    if made.confidence < SURE:
        return False
    chances = beyond_chance(grams, told, regression, FLIPS, 0)
    return chances[ranking[0]] <= 1 - SURE


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", metavar="TASK")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args(argv)
    for task in arguments.tasks:
        evidence = pool(task, arguments.data)
        for size in SIZES:
            found = coverage(evidence, size, arguments.draws)
            at = {"model": MINILM, "task": task, "size": size, "pool": evidence.examples}
            keep(at | found)


def keep(record: dict[str, object]) -> None:
    """Write a line in the place of what there was of it."""
    known = {(r["model"], r["task"], r["size"]): r for r in results()}
    known[record["model"], record["task"], record["size"]] = record
    with whole_file(RESULTS) as temporary:
        text = "".join(json.dumps(line) + "\n" for line in known.values())
        temporary.write_text(text, encoding="utf-8")
    print(json.dumps(record), flush=True)


def results() -> list[dict[str, object]]:
    """What has been measured."""
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
