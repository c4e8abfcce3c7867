"""Run one of the paper's tables, or its heatmaps, with the authors' hyperparameters.

    python benchmarks/paper/run.py --table 1 [--data DIR] [--seeds 5]
    python benchmarks/paper/run.py --table 1 --model minilm --epochs 4 --tasks sst2,rte
    python benchmarks/paper/run.py --table heatmaps --model FOLDER --name NAME

One JSON line a run in benchmarks/results/paper/; what is there is not run again. A model or data
set that cannot be had is a line that says why, tried again the next time. --model puts a
stand-in in the place of the table's first model; --rows, --epochs and --evaluated (of the
validation rows) shorten runs, --faster raises the rates of short ones, and each line holds what
it was run with beside what the authors ran. ``render.py`` writes docs/paper.md.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import store
import torch
from cells import HEATMAPS, TABLES, Cell, Hyper, cells
from transformers.utils import logging

from beft_ext import find_biases, select
from beft_ext.commands import demo
from beft_ext.commands.comparison import RUNS, Comparison
from beft_ext.commands.loading import ModelSpec, pretrained
from beft_ext.commands.methods import method
from beft_ext.commands.sources import Source
from beft_ext.commands.workflow import Settings
from beft_ext.models import BiasError
from beft_ext.selection import Selection
from beft_ext.tasks import PromptObjective, subset

BIAS_OF_KEY = ("key", "low-rank:key")
HEATMAP_SCORES = ("beft", "magnitude", "fisher")
FISHER_BATCH, STILL = 8, 1e-12  # the authors' Fisher information is of untrained weights


@dataclass(frozen=True)
class Place:
    """What a table is run on. model: folder of a stand-in called ``stand_in``, None for the
    table's own models. data: folder of the tasks, None for the hub. rows, epochs, evaluated: at
    most. faster: factor of the authors' rates."""

    model: str | None
    stand_in: str | None
    data: Path | None
    rows: int | None
    epochs: int | None
    evaluated: int | None
    faster: float
    out: Path
    work: Path

    def asked(self, cell: Cell) -> str:
        return self.model or cell.model

    def about(self) -> str | None:
        """What the data's folder says about itself, where it is not the task's own data."""
        path = self.data / "about.txt" if self.data else None
        return path.read_text(encoding="utf-8").strip() if path and path.is_file() else None

    def hyper(self, hyper: Hyper) -> Hyper:
        rows, evaluated = _least(hyper.rows, self.rows), _least(hyper.evaluated, self.evaluated)
        epochs = min(hyper.epochs, self.epochs or hyper.epochs)
        lr = None if hyper.lr is None else float(f"{hyper.lr * self.faster:.6g}")
        return replace(hyper, lr=lr, rows=rows, epochs=epochs, evaluated=evaluated)

    def told(self, reason: str) -> str:
        """A reason without the names of this machine's folders."""
        for path, name in ((self.data, "DIR"), (self.model, self.stand_in)):
            reason = reason.replace(str(path), str(name)) if path else reason
        return reason


def _least(*numbers: int | None) -> int | None:
    return min((n for n in numbers if n is not None), default=None)


def begun(cell: Cell, place: Place, method_name: str | None, seed: int | None) -> store.Record:
    """What identifies a run, with what it runs on; metrics and failure still empty."""
    hyper, authors = asdict(place.hyper(cell.hyper)), asdict(cell.hyper)
    record: store.Record = {"table": cell.table, "model": cell.model, "stand_in": place.stand_in}
    record |= {"data": place.about(), "task": cell.task, "regime": cell.regime}
    record |= {"method": method_name, "ran": method_name, "seed": seed, "hyper": hyper}
    record["authors"] = {k: v for k, v in authors.items() if hyper[k] != v}
    return record | {"metrics": {}, "failure": None}


def run(table: str, place: Place, wanted: Sequence[Cell], seeds: int) -> None:
    """Every cell with every seed, seeds in the outer loop: a stopped table is even."""
    told = set()
    for seed in range(seeds):
        for cell in wanted:
            if seed and (cell.method == "zero-shot" or table == HEATMAPS):
                continue  # nothing in them depends on the seed that is worth a second run
            group = begun(cell, place, None, None)
            if reason := _missing(cell, place):
                if (cell.model, cell.task, cell.regime) not in told:
                    _keep(group | {"failure": reason}, place)
                told.add((cell.model, cell.task, cell.regime))
                continue
            store.forget(group, place.out)
            record = begun(cell, place, cell.method, seed)
            if not store.done(record, place.out):
                _keep(_measured(record, cell, place, seed), place)


def _measured(record: store.Record, cell: Cell, place: Place, seed: int) -> store.Record:
    if cell.table == HEATMAPS:
        return record | _importance(cell, place, seed)
    record["ran"] = _ran(cell, place)
    others = (t for t in TABLES if t != cell.table)
    if found := store.twin(record, others, place.out):
        return found | {k: record[k] for k in (*store.KEY, "authors")}
    return record | _trained(record["ran"], cell, place, seed)


def _trained(name: str, cell: Cell, place: Place, seed: int) -> store.Record:
    """One run by ``Comparison``: metrics, parameters, seconds, peak, kept, failure."""
    hyper = place.hyper(cell.hyper)
    lr = hyper.lr or 1.0  # of methods that do not train nothing is asked
    settings = Settings(hyper.rows, hyper.batch, epochs=hyper.epochs, lr=lr, group_by_length=False)
    spec = ModelSpec(place.asked(cell), max_length=hyper.max_length)
    comparison = Comparison(
        Source(cell.task, place.data),
        spec,
        settings,
        [name],
        [seed],
        rates={name: lr} if method(name).trains else {},
        decay=hyper.decay,
        evaluated=hyper.evaluated,
    )
    shown = (place.stand_in or cell.model).replace("/", "--")
    numbers = f"{hyper.rows}x{hyper.epochs}-{lr}-{hyper.evaluated}"
    folder = place.work / f"{shown}-{cell.task}-{numbers}"
    (folder / RUNS).unlink(missing_ok=True)  # the table's file is the record; checkpoints stay
    outcome = asdict(comparison.run(folder)[0])
    del outcome["method"], outcome["seed"], outcome["chosen"]
    if outcome["failure"]:
        outcome["failure"] = place.told(outcome["failure"])
    return outcome | _machine()


def _importance(cell: Cell, place: Place, seed: int) -> store.Record:
    """Scores of each term by layer: BEFT and magnitude after training all biases, Fisher of the
    untrained weights."""
    hyper = place.hyper(cell.hyper)
    model, objective = ModelSpec(place.asked(cell), seed=seed).load(Source(cell.task).task)
    train = subset(Source(cell.task, place.data).read("train"), hyper.rows, seed)

    def found(batch: int, **options: Any) -> Selection:
        loader = objective.training(train, batch, seed, by_length=False)
        return select(model, loader, "beft", loss=objective.loss, seed=seed, **options)

    moved = found(hyper.batch, lr=hyper.lr, epochs=hyper.epochs)
    still = found(FISHER_BATCH, lr=STILL, epochs=1)
    per_layer = {m: (still if m == "fisher" else moved).per_layer[m] for m in HEATMAP_SCORES}
    numbers = {
        m: {t: [None if math.isnan(x) else x for x in row] for t, row in rows.items()}
        for m, rows in per_layer.items()
    }
    return {"metrics": {}, "per_layer": numbers, "dead": moved.dead} | _machine()


def _ran(cell: Cell, place: Place) -> str:
    """The method as it is run: a stand-in's random mask has as many places as it has biases,
    which the authors' number is near to; a key's bias that is dead leaves what trains beside it."""
    if cell.method in BIAS_OF_KEY:
        return _without_key(place.asked(cell), cell.task, place) or cell.method
    if place.model is None or not cell.method.startswith("random-mask"):
        return cell.method
    model, _ = ModelSpec(place.model).load(Source(cell.task).task)
    return f"random-mask:{sum(b.width for b in find_biases(model))}"


def _missing(cell: Cell, place: Place) -> str | None:
    """Why a cell cannot be run, or None."""
    reason = _without_model(place.asked(cell)) or _without_data(cell.task, place.data)
    rows = place.hyper(cell.hyper).rows
    if reason is None and rows is not None:
        there = len(_train(cell.task, place.data))
        if there < rows:
            reason = f"it takes {rows:,} training rows, the data here has {there:,}"
    return None if reason is None else place.told(reason)


@cache
def _without_model(model: str) -> str | None:
    try:
        pretrained(model, "AutoConfig")
    except ValueError as error:
        return str(error)
    return None


@cache
def _without_data(task: str, data: Path | None) -> str | None:
    try:
        _train(task, data)
        Source(task, data).read("validation")
    except (ValueError, OSError) as error:
        return str(error)
    return None


@cache
def _train(task: str, data: Path | None) -> list[Any]:
    return Source(task, data).read("train")


@cache
def _without_key(model: str, task: str, place: Place) -> str | None:
    """The method that training a dead key's bias comes to: softmax ignores it, so its gradient is
    exactly zero. None where it is not dead."""
    loaded, objective = ModelSpec(model).load(Source(task).task)
    loader = objective.training(_train(task, place.data)[:4], 4, 0)
    try:
        found = select(loaded, loader, "beft", loss=objective.loss, steps=1)
    except BiasError:
        return None
    alone = "zero-shot" if isinstance(objective, PromptObjective) else "head"
    return alone if "key" in found.dead else None


def _machine() -> store.Record:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device = cuda or f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__}


def _keep(record: store.Record, place: Place) -> None:
    store.add(record, place.out)
    what = " ".join(str(record[k]) for k in ("task", "regime", "method", "seed") if record[k])
    found = " ".join(f"{k} {v:.4f}" for k, v in record["metrics"].items())
    print(f"table {record['table']}: {record['stand_in'] or record['model']} {what}: ", end="")
    print(record["failure"] or found or "done", flush=True)


def _wanted(arguments: argparse.Namespace) -> Iterator[Cell]:
    """The cells that are asked for; a stand-in is run once where the table has many models."""
    chosen = {k: getattr(arguments, f"{k}s").split(",") for k in ("task", "regime", "method")}
    seen = set()
    for cell in cells(arguments.table):
        where = (cell.task, cell.regime, cell.method)
        if arguments.model and where in seen:
            continue
        seen.add(where)
        if all(chosen[k] in ([""], ["all"]) or getattr(cell, k) in chosen[k] for k in chosen):
            yield cell


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", required=True, choices=TABLES)
    parser.add_argument("--model", metavar="STANDIN", help="a folder, or minilm")
    parser.add_argument("--name", help="what the stand-in is called (default: its folder's name)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="DIR/TASK/train.jsonl and so on")
    for what in ("tasks", "regimes", "methods"):
        parser.add_argument(f"--{what}", default="all", metavar="A,B")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--rows", type=int, metavar="N", help="training rows at most")
    parser.add_argument("--epochs", type=int, metavar="N", help="epochs at most")
    parser.add_argument("--evaluated", type=int, metavar="N", help="validation rows at most")
    parser.add_argument("--faster", type=float, default=1.0, metavar="X", help="rates times X")
    parser.add_argument("--out", type=Path, default=store.RESULTS, metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("out/paper/runs"), metavar="DIR")
    a = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, name = a.model, a.name
    if model == "minilm":
        model, name = str(demo.minilm()), name or "MiniLM"
    name = None if model is None else name or Path(model).name
    limits = (a.rows, a.epochs, a.evaluated, a.faster)
    place = Place(model, name, a.data, *limits, a.out, a.work / a.table)
    run(a.table, place, list(_wanted(a)), a.seeds)


if __name__ == "__main__":
    main()
