"""Does the selection pick the term that then trains best? Measures; study_page.py tells.

A cell is a task, a number of examples and a seed, and has these parts:

- ``gain``: what each living term of MiniLM would explain, told before any training;
- ``choices``: the first term by each score of ``select``, after several numbers of steps;
- ``scores``: those after the most steps;
- ``reached``: the task's ``metric`` on the whole validation split of each term trained alone,
  with the head, for the same number of steps from the same start.

Cells are lines of benchmarks/results/study.jsonl. Only the parts that a cell lacks are measured.

    python benchmarks/study.py sst2:100 sst2:300 rte:300 --data DIR --seeds 5
    python benchmarks/study.py sentences:100 --seeds 5       # the shipped sentences
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from beft_ext import Selection, find_biases, measure_gains, select
from beft_ext.commands import demo
from beft_ext.commands.loading import ModelSpec, Source
from beft_ext.files import whole_file
from beft_ext.scores import SCORES
from beft_ext.selection import ModelSnapshot, Run
from beft_ext.tap import Tap
from beft_ext.tasks import Batches, subset

RESULTS = Path(__file__).resolve().parent / "results" / "study.jsonl"
BATCH, STEPS, LR = 16, 80, 1e-2
SELECTING = (5, 10, 20, 40)
KEPT = ("values", "errors", "chance", "leads", "head", "examples")  # of the gains
Record = dict[str, Any]


class Cell:
    """The rows of a task, and a model that each part leaves as it was."""

    def __init__(self, task: str, size: int, seed: int, data: Path | None) -> None:
        self.source, self.seed = source(task, data), seed
        self.rows = subset(self.source.read("train"), size, seed)
        self.model, self.objective = ModelSpec(str(demo.minilm()), seed=seed).load(self.source.task)

    def batches(self) -> Batches:
        return self.objective.training(self.rows, BATCH, self.seed)

    def gain(self, _: Record) -> Record:
        """The gains, and how long it took to measure them."""
        start = time.perf_counter()
        found = measure_gains(
            self.model, self.batches(), observe=self.objective.observe, seed=self.seed
        ).record()
        seconds = time.perf_counter() - start
        return {key: found[key] for key in KEPT} | {"seconds": round(seconds, 2)}

    def choices(self, _: Record) -> dict[str, dict[str, str]]:
        """By steps and score."""
        rankings = {steps: self.selected(steps).ranking for steps in SELECTING}
        return {str(n): {m: found[m][0] for m in SCORES} for n, found in rankings.items()}

    def scores(self, _: Record) -> dict[str, dict[str, float]]:
        """By score and living term."""
        found = self.selected(SELECTING[-1])
        return {m: {t: found.scores[m][t] for t in found.ranking[m]} for m in SCORES}

    def selected(self, steps: int) -> Selection:
        return select(self.model, self.batches(), "beft", steps=steps, seed=self.seed)

    def reached(self, record: Record) -> dict[str, float]:
        """The task's metric of each living term trained alone."""
        validation = self.source.read("validation")
        held_out, biases = self.objective.held_out(validation, 64), find_biases(self.model)
        reached = {}
        for term in record["gain"]["values"]:
            own = [b for b in biases if b.term == term]
            with ModelSnapshot(self.model), Tap(self.model, own) as tap:
                torch.manual_seed(self.seed)
                Run(self.model, tap, steps=STEPS, lr=LR).train(self.batches(), progress=False)
                metrics = self.objective.evaluate(self.model, held_out, validation)
            reached[term] = metrics[self.source.task.metric]
        return reached


# In order: a part is given the cell's record with those before it.
PARTS: dict[str, Callable[[Cell, Record], Any]] = {
    "metric": lambda cell, _: cell.source.task.metric,
    "gain": Cell.gain,
    "choices": Cell.choices,
    "scores": Cell.scores,
    "reached": Cell.reached,
}


def source(task: str, data: Path | None) -> Source:
    if task == "sentences":
        files = (demo.DATA / f"{split}.jsonl" for split in ("train", "validation"))
        return Source(None, None, *files)
    return Source(task, data)


def place(record: Record) -> tuple[str, int, int]:
    return record["task"], record["size"], record["seed"]


def complete(record: Record, data: Path | None) -> None:
    """Measure what a cell's record lacks, and keep it."""
    missing = [part for part in PARTS if part not in record]
    if missing:
        cell = Cell(*place(record), data)
        record = dict(record)
        for part in missing:
            record[part] = PARTS[part](cell, record)
        keep(record)
        print(json.dumps(record), flush=True)


def keep(record: Record) -> None:
    """Write a cell in the place of what there was of it."""
    known = {place(r): r for r in results()}  # read anew: another process may have added some
    known[place(record)] = record
    with whole_file(RESULTS) as temporary:
        text = "".join(json.dumps(line) + "\n" for line in known.values())
        temporary.write_text(text, encoding="utf-8")


def results() -> list[Record]:
    """What has been measured."""
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="+", metavar="TASK:SIZE")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args(argv)
    for cell in arguments.cells:
        task, _, size = cell.partition(":")
        for seed in range(arguments.seeds):
            known = {place(r): r for r in results()}
            new = {"task": task, "size": int(size), "seed": seed, "steps": STEPS}
            complete(known.get((task, int(size), seed), new), arguments.data)


if __name__ == "__main__":
    main()
