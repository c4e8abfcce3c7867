"""Does the selection pick the term that then trains best? Measures; study_page.py tells.

For each task, size and seed: every living term of MiniLM is trained alone, with the head, for
the same number of steps from the same start, and evaluated on the whole validation split;
``select`` is run for several numbers of steps, its choice by each method noted; and on the way
each term's BEFT score and its standard error, by which a run may end early. One JSON line for
each in benchmarks/results/study.jsonl; what is there is not run again.

    python benchmarks/study.py sst2:100 sst2:300 rte:300 --data DIR --seeds 5
    python benchmarks/study.py sentences:100 --seeds 5       # the shipped sentences
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from beft_ext.selection.settling import FIRST, Settling
from torch import nn

from beft_ext import find_biases, scores, select
from beft_ext.commands import demo
from beft_ext.commands.loading import ModelSpec, Source
from beft_ext.files import whole_file
from beft_ext.models import Bias
from beft_ext.selection import ModelSnapshot, Run
from beft_ext.tap import Tap
from beft_ext.tasks import subset

RESULTS = Path(__file__).resolve().parent / "results" / "study.jsonl"
BATCH, STEPS, LR = 16, 80, 1e-2
SELECTING = (5, 10, 20, 40)
Looks = dict[str, dict[str, tuple[float, float]]]  # by step and term: score, standard error


def source(name: str, data: Path | None) -> Source:
    if name == "sentences":
        files = (demo.DATA / f"{split}.jsonl" for split in ("train", "validation"))
        return Source(None, None, *files)
    return Source(name, data)


def measure(name: str, size: int, seed: int, data: Path | None) -> dict[str, Any]:
    """Metric of each term trained alone, and each method's choice after some steps."""
    origin = source(name, data)
    train = subset(origin.read("train"), size, seed)
    validation = origin.read("validation")
    model, objective = ModelSpec(str(demo.minilm()), seed=seed).load(origin.task)
    held_out = objective.held_out(validation, 64)
    biases = find_biases(model)
    choices: dict[str, dict[str, str]] = {}
    dead: list[str] = []
    for steps in SELECTING:
        found = select(model, objective.training(train, BATCH, seed), steps=steps, seed=seed)
        choices[str(steps)] = {m: found.ranking[m][0] for m in scores.SCORES}
        dead = found.dead
    alive = [b for b in biases if b.term not in dead]
    looks = looked_at(model, alive, objective.training(train, BATCH, seed), seed)
    reached = {}
    for term in dict.fromkeys(b.term for b in alive):
        loader = objective.training(train, BATCH, seed)
        with ModelSnapshot(model), Tap(model, [b for b in biases if b.term == term]) as tap:
            torch.manual_seed(seed)
            Run(model, tap, steps=STEPS, lr=LR).train(loader, progress=False)
            metrics = objective.evaluate(model, held_out, validation)
        reached[term] = metrics[origin.task.metric]
    place = {"task": name, "size": size, "seed": seed, "steps": STEPS}
    found_all = {"reached": reached, "choices": choices, "looks": looks}
    return place | {"metric": origin.task.metric} | found_all


def looked_at(model: nn.Module, biases: Sequence[Bias], loader: Any, seed: int) -> Looks:
    """Scores and errors at each step of the longest selection from the first look on."""
    looks: Looks = {}
    settling = Settling("beft", risk=0.05)

    def look(run: Run) -> bool:
        if run.done >= FIRST:
            means, errors = settling.measured(run)
            looks[str(run.done)] = {t: (means[t], errors[t]) for t in means}
        return False

    with ModelSnapshot(model), Tap(model, biases) as tap:
        torch.manual_seed(seed)
        Run(model, tap, steps=SELECTING[-1]).train(loader, progress=False, enough=look)
    return looks


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="+", metavar="TASK:SIZE")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args(argv)
    for cell in arguments.cells:
        name, _, size = cell.partition(":")
        for seed in range(arguments.seeds):
            if (name, int(size), seed) in {(r["task"], r["size"], r["seed"]) for r in results()}:
                continue
            record = measure(name, int(size), seed, arguments.data)
            lines = [*results(), record]  # read anew: another process may have added some
            with whole_file(RESULTS) as temporary:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                temporary.write_text(text, encoding="utf-8")
            print(json.dumps(record), flush=True)


def results() -> list[dict[str, Any]]:
    """What has been measured."""
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
