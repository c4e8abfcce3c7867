"""Does the selection pick the term that then trains best? Measures; study_page.py tells.

A cell is a model, a task, a number of examples and a draw of them, and has these parts:

- ``gain``: what each living term would explain, told before any training; and what rivals of the
  gain say of the same gradients;
- ``scores``: those of ``select`` after its training run;
- ``audition``: short trainings of the terms with the largest gains, over a few rates;
- ``reached``: accuracy and loss of each term trained alone, with the head, at each rate, on two
  halves of the validation rows: one names the best term, the other tells what a pick loses;
- ``raced``: the same of the term with the largest gain at the rate that ``--lr auto`` takes.

Cells are lines of benchmarks/results/study.jsonl. Only the parts that a cell lacks are measured.

    python benchmarks/study.py sst2:100 sst2:300 rte:300 --data DIR --draws 2
    python benchmarks/study.py sentences:100                 # the shipped sentences
    python benchmarks/study.py sst2:64 --data DIR --model FOLDER --name NAME
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rivals import RIVALS
from torch import Tensor, nn

from beft_ext import BiasAdamW, measure_gains, select
from beft_ext.commands import demo
from beft_ext.commands.loading import ModelSpec, classes_of, goes_left_to_right
from beft_ext.files import whole_file
from beft_ext.scores import SCORES
from beft_ext.selection import audition, rate_of_step, rates_around, terms_of
from beft_ext.tasks import Batches, Example, Task, load_task, named_task, read_rows, subset
from beft_ext.training.optim import rate_factor
from beft_ext.training.steps import EagerStep

RESULTS = Path(__file__).resolve().parent / "results" / "study.jsonl"
MINILM = "MiniLM"
WARMUP, SELECTING, CONTENDERS = 0.06, 40, 4
RACED_ROWS = 2400  # that a race may read, where this is more than three epochs of the rows
HALVES, JUDGING = 2, 64
KEPT = ("values", "errors", "chance", "leads", "head", "examples", "steps")  # of the gains
OWN = {  # tasks that the catalogue lacks
    "subj": Task(
        text="{sentence}",
        classes=("subjective", "objective"),
        prompt="{sentence}\nThis is",
        options=(" an opinion.", " a fact."),
    ),
    "trec": Task(text="{sentence}"),
}
Record = dict[str, Any]
Place = tuple[str, str, int, int]


@dataclass(frozen=True)
class Plan:
    """How a kind of model trains. rates: each term is tried at all; steps: at least, and
    ``epochs`` at least; most: validation rows."""

    rates: tuple[float, ...]
    size: int
    steps: int
    epochs: int
    most: int

    def length(self, rows: int) -> int:
        """Steps of a training on so many rows."""
        return max(self.steps, self.epochs * math.ceil(rows / self.size))


ENCODER = Plan((1e-2, 3e-2), size=16, steps=80, epochs=3, most=1000)
DECODER = Plan((3e-4, 3e-3, 1e-2), size=8, steps=32, epochs=2, most=200)


@dataclass(frozen=True)
class Judged:
    """A half of the validation rows: share that is right, and mean loss."""

    accuracy: float
    loss: float


class Cell:
    """The rows of a task, and a model that each part leaves as it was."""

    def __init__(self, place: Place, data: Path | None, model: Path | None) -> None:
        _, name, size, self.draw = place
        task, train, validation = examples_of(name, data)
        spec = ModelSpec(str(model or demo.minilm()), seed=self.draw)
        self.model, self.objective = spec.load(task, classes_of(train))
        self.plan = DECODER if goes_left_to_right(self.model.config) else ENCODER
        self.rows = subset(train, size, self.draw)
        judging = subset(validation, min(self.plan.most, len(validation)), 0)
        judged = self.objective.training(judging, JUDGING, 0)
        self.halves = [judged.part(range(half, len(judged.rows), HALVES)) for half in range(HALVES)]

    def batches(self) -> Batches:
        return self.objective.training(self.rows, self.plan.size, self.draw, by_length=True)

    def gain(self, _: Record) -> Record:
        """The gains, what rivals say, and how long it took."""
        start = time.perf_counter()
        gains = measure_gains(
            self.model, self.batches(), observe=self.objective.observe, seed=self.draw
        )
        seconds = time.perf_counter() - start
        said = {name: rival(gains) for name, rival in RIVALS.items()}
        found = {key: gains.record()[key] for key in KEPT}
        return found | {"rivals": said, "seconds": round(seconds, 2)}

    def scores(self, record: Record) -> Record:
        """By score and term; none where no candidate has a bias."""
        start = time.perf_counter()
        try:
            found = select(
                self.model,
                self.batches(),
                "example_fisher",
                loss=self.objective.loss,
                observe=self.objective.observe,
                terms=list(record["gain"]["values"]),
                steps=SELECTING,
                seed=self.draw,
            )
        except ValueError:
            return {}
        kept = {m: {t: found.scores[m][t] for t in found.ranking[m]} for m in SCORES}
        return kept | {"seconds": round(time.perf_counter() - start, 2)}

    def audition(self, record: Record) -> Record:
        """Who won, at which rate, at what cost."""
        gains = record["gain"]
        racing = sorted(gains["values"], key=lambda t: -gains["values"][t])[:CONTENDERS]
        return self._raced(record, racing)

    def _raced(self, record: Record, terms: Sequence[str]) -> Record:
        found = audition(
            {term: terms_of(self.model, term) for term in terms},
            self.batches(),
            {t: rates_around(rate_of_step(record["gain"]["steps"][t])) for t in terms},
            loss=self.objective.loss,
            losses=lambda model, batch: self.objective.observe(model, batch).means,
            budget=max(3.0, RACED_ROWS / len(self.rows)),
            seed=self.draw,
        )
        cost = {"epochs": round(found.epochs, 2), "seconds": round(found.seconds, 2)}
        return {"best": found.best, "rate": found.rate, "sure": found.sure_of_contender} | cost

    def reached(self, record: Record) -> dict[str, dict[str, list[Record]]]:
        """By term and rate, each half of the validation rows."""
        return {
            term: {f"{rate:g}": self.trained(term, rate) for rate in self.plan.rates}
            for term in record["gain"]["values"]
        }

    def raced(self, record: Record) -> Record:
        """Of the term with the largest gain."""
        values = record["gain"]["values"]
        found = self._raced(record, [max(values, key=values.__getitem__)])
        return found | {"reached": self.trained(found["best"], found["rate"])}

    def trained(self, term: str, rate: float) -> list[Record]:
        """What the model of the last step reaches on each half."""
        steps = self.plan.length(len(self.rows))
        with terms_of(self.model, term)() as model:
            torch.manual_seed(self.draw)
            optimizer = BiasAdamW(model, lr=rate, max_grad_norm=1.0)
            step = EagerStep(model, optimizer, self.objective.loss)
            model.train()
            for number, batch in enumerate(itertools.islice(_endless(self.batches()), steps)):
                step(batch, rate * rate_factor(number, steps, WARMUP, True))
            model.eval()
            return [vars(self.judged(model, half)) for half in self.halves]

    @torch.no_grad()
    def judged(self, model: nn.Module, rows: Batches) -> Judged:
        seen = [self.objective.observe(model, batch) for batch in rows]
        losses = torch.cat([s.means for s in seen])
        right = [s.probabilities.argmax(-1) == s.right for s in seen]
        accuracy = float(torch.cat(right).double().mean())
        return Judged(round(accuracy, 5), round(float(losses.double().mean()), 5))


def _endless(batches: Batches) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from batches


# In order: a part is given the cell's record with those before it.
PARTS: dict[str, Callable[[Cell, Record], Any]] = {
    "gain": Cell.gain,
    "scores": Cell.scores,
    "audition": Cell.audition,
    "reached": Cell.reached,
    "raced": Cell.raced,
}


def examples_of(name: str, data: Path | None) -> tuple[Task, list[Example], list[Example]]:
    """A task with its rows to train on and to validate on."""
    if name == "sentences" or name in OWN:
        task = OWN.get(name, Task(text="{sentence}"))
        folder, files = (demo.DATA, "") if name == "sentences" else (data, f"{name}/")
        assert folder is not None, f"{name} needs --data DIR"
        paths = [folder / f"{files}{split}.jsonl" for split in ("train", "validation")]
        train, validation = (task.examples(read_rows(path), str(path)) for path in paths)
    else:
        train, validation = (load_task(name, s, data) for s in ("train", "validation"))
        task = named_task(name)
    return task, train, validation


def place(record: Record) -> Place:
    return record["model"], record["task"], record["size"], record["draw"]


def complete(record: Record, data: Path | None, model: Path | None = None) -> None:
    """Measure what a cell's record lacks, and keep it."""
    missing = [part for part in PARTS if part not in record]
    if missing:
        cell = Cell(place(record), data, model)
        record = dict(record)
        for part in missing:
            start = time.perf_counter()
            record[part] = PARTS[part](cell, record)
            keep(record)
            print(*place(record), part, f"{time.perf_counter() - start:.0f} s", flush=True)


def keep(record: Record) -> None:
    """Write a cell in the place of what there was of it."""
    known = {place(r): r for r in results()}  # read anew: another process may have added some
    known[place(record)] = record
    with whole_file(RESULTS) as temporary:
        text = "".join(json.dumps(line) + "\n" for line in known.values())
        temporary.write_text(text, encoding="utf-8")


def results(path: Path | None = None) -> list[Record]:
    """What has been measured."""
    path = path or RESULTS
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finished() -> list[Record]:
    """The cells that have all parts."""
    return [r for r in results() if PARTS.keys() <= r.keys()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="+", metavar="TASK:SIZE")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the demo's MiniLM")
    parser.add_argument("--name", default=MINILM, help="of the model, in the results")
    parser.add_argument("--draws", type=int, default=2)
    arguments = parser.parse_args(argv)
    for draw, cell in itertools.product(range(arguments.draws), arguments.cells):
        task, _, size = cell.partition(":")
        new = {"model": arguments.name, "task": task, "size": int(size), "draw": draw}
        known = {place(r): r for r in results()}
        complete(known.get(place(new), new), arguments.data, arguments.model)


if __name__ == "__main__":
    main()
