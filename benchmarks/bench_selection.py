"""How long until we know which term to train? A whole selection, beside the authors' pipeline.

The trained MiniLM, the same sentences, order, rate and number of steps; model, tokens and
batches are made before the clock starts. 'Ours' is the run of ``select``, 'ours, gains' what
``--terms auto`` measures in its place; its pass may end early. The gains' own cost is measured on
all rows, beside 'forward and backward': a pass over the same batches in plain torch, in evaluation
mode, with gradients of the biases and nothing else. ``--data DIR`` takes 1,000 rows of DIR/sst2 in
place of the shipped sentences. Rankings are of the terms that are not dead. Writes selection.json
or selection_sst2.json in benchmarks/results/<device>/.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import authors
from harness import measure, settings, show, write
from torch import nn

import beft_ext
from beft_ext.commands import demo
from beft_ext.selection import Gains, Selection, measuring
from beft_ext.tasks import Batches, Example, HeadObjective, load_task, subset
from beft_ext.training.loss import on_device

ROWS, LR, SEED = 1000, 4e-4, 0
PASSES = 3  # rounds of the passes, which are short


class Job:
    """A model and its examples; one method a way to select."""

    def __init__(self, examples: Sequence[Example], device: str) -> None:
        model, tokenizer = demo.load()
        for module in model.modules():  # so that both ways see the same losses
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.model = model.to(device)
        self.objective = HeadObjective(demo.TASK, tokenizer)
        self.examples = examples
        self.biases = beft_ext.find_biases(model)
        self.rankings: dict[str, list[str]] = {}
        self.dead: list[str] = []

    def batches(self, size: int, by_length: bool = False) -> Batches:
        return self.objective.training(self.examples, size, SEED, by_length)

    def ours(self, name: str, by_length: bool = False) -> Any:
        loader = self.batches(authors.TRAINING_BATCH, by_length)

        def call() -> Selection:
            loader.set_epoch(0)
            found = beft_ext.select(self.model, loader, "beft", lr=LR, seed=SEED)
            self.rankings[name], self.dead = found.ranking["beft"], found.dead
            return found

        return call

    def gains(self, name: str, first_look: float = measuring.FIRST_LOOK) -> Any:
        """first_look: rows from which on the pass may end early."""
        loader = self.batches(authors.TRAINING_BATCH)

        def call() -> Gains:
            loader.set_epoch(0)
            with mock.patch.object(measuring, "FIRST_LOOK", first_look):
                found = beft_ext.measure_gains(
                    self.model, loader, observe=self.objective.observe, seed=SEED
                )
            self.rankings[name] = found.ranking
            return found

        return call

    def passed(self) -> Any:
        """Forward and backward alone."""
        loader = self.batches(authors.TRAINING_BATCH)
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        for bias in self.biases:
            model.get_parameter(bias.parameter).requires_grad_(True)

        def call() -> None:
            loader.set_epoch(0)
            for batch in loader:
                model.zero_grad()
                model(**on_device(batch, model.device)).loss.backward()

        return call

    def theirs(self, name: str) -> Any:
        loaders = [self.batches(n) for n in (authors.FISHER_BATCH, authors.TRAINING_BATCH)]

        def call() -> authors.Scores:
            for loader in loaders:
                loader.set_epoch(0)
            model = copy.deepcopy(self.model)
            found = authors.select(model, self.biases, *loaders, lr=LR)
            values = found["beft"]
            self.rankings[name] = sorted(values, key=lambda term: -values[term])
            return found

        return call


def examples(data: Path | None, rows: int) -> list[Example]:
    """Rows of SST-2 in the folder ``data``, or shipped sentences."""
    found = demo.examples("train") if data is None else load_task("sst2", "train", data)
    return subset(found, min(rows, len(found)), SEED)


def main() -> None:
    folder = {"type": Path, "metavar": "DIR", "help": "holds sst2/train.jsonl"}
    arguments = settings(__doc__, rounds=1, data=folder)
    rows = examples(arguments.data, 32 if arguments.quick else ROWS)
    job = Job(rows, arguments.device)
    makers = {
        "ours": lambda: job.ours("ours"),
        "ours, by length": lambda: job.ours("ours, by length", by_length=True),
        "ours, gains": lambda: job.gains("ours, gains"),
        "authors' pipeline": lambda: job.theirs("authors' pipeline"),
    }
    found = measure(makers, arguments, warm=False)
    passes = {"ours": lambda: job.gains("all rows", math.inf), "forward and backward": job.passed}
    beside = measure(passes, arguments, rounds=PASSES)
    del job.rankings["all rows"]
    alive = {n: [t for t in r if t not in job.dead] for n, r in job.rankings.items()}
    for name, ranking in alive.items():
        found[name]["ranking"] = ranking
        print(name, *ranking)
    shipped = arguments.data is None
    key = f"MiniLM, {len(rows):,} {'shipped sentences' if shipped else 'rows of SST-2'}"
    show(key, found)
    show(key, beside)
    results = {"whole": {key: found}, "gains": {key: beside}}
    write("selection" if shipped else "selection_sst2", arguments, results)


if __name__ == "__main__":
    main()
