"""``compare``: methods side by side on one task, with the same data, seeds and budget."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from beft_ext.commands.loading import ModelSpec, WorkflowError, outputs_of
from beft_ext.commands.memory import peak_bytes
from beft_ext.commands.methods import Method, MethodError, kept_bytes, method, trained
from beft_ext.commands.placement import USUAL
from beft_ext.commands.processes import own_part, shared_by_all
from beft_ext.commands.reporting import BATCH, BEST
from beft_ext.commands.sources import Source
from beft_ext.commands.workflow import (
    RACE,
    Settings,
    chosen_by_gains,
    first_rate,
    raced,
)
from beft_ext.files import JsonObject, locked, save_json, whole_file
from beft_ext.models.offload import device_of
from beft_ext.parallel import RankError, here, leads, meeting
from beft_ext.selection import made_by
from beft_ext.selection.run import require_same
from beft_ext.tasks import Example, Objective, PromptObjective, subset
from beft_ext.tasks.streams import Examples
from beft_ext.training.optim import BiasAdamW
from beft_ext.training.preparation import prepare
from beft_ext.training.steps import EagerStep
from beft_ext.training.tuning import CHECKPOINT, Recipe, tune

RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Outcome:
    """One method with one seed. seconds: of training and evaluation, selection included;
    peak: bytes of one training step beyond the model; kept: bytes of the files that hold what
    was trained; chosen: the term that 'auto' selected; lr: the rate that it trained at; failure:
    why there is no result; about: the version that ran it, and its task."""

    method: str
    seed: int
    metrics: dict[str, float]
    parameters: int = 0
    seconds: float = 0.0
    peak: int | None = None
    kept: int = 0
    chosen: str | None = None
    lr: float | None = None
    failure: str | None = None
    about: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What is compared on what. settings.lr: of methods without a usual rate of their own; where
    settings has a budget, rates are raced for each method, around its usual one or, of bias terms,
    around what their gains tell. rates: for methods by
    name, as they are. decay: rates fall to zero; without, they stay.
    evaluated: number of validation examples, drawn with seed 0; all of them by default."""

    source: Source
    spec: ModelSpec
    settings: Settings
    methods: Sequence[str]
    seeds: Sequence[int]
    rates: Mapping[str, float]
    decay: bool = True
    evaluated: int | None = None

    def run(self, out: Path) -> list[Outcome]:
        """Every method with every seed; ``out`` keeps a line for each.

        What it has a result of is not run again; what failed is. Another process may fill the
        same folder at the same time.

        Raises: WorkflowError, DataError or MethodError before anything is run.
        """
        ways = {name: method(name) for name in self.methods}
        if not self.seeds:
            raise WorkflowError("--seeds must be at least 1")
        if unused := [n for n in self.rates if n not in ways]:
            raise WorkflowError(f"a rate is given for '{unused[0]}', which is not compared")
        train, validation = self.source.training(), self.source.read("validation")
        if self.evaluated is not None and self.evaluated < len(validation):
            validation = subset(validation, self.evaluated, seed=0)
        judging = self.source.read("test") if self.source.has_test else validation
        setup, ranks = self._setup(), here()
        outcomes = ranks.first(_read(out / RUNS, setup) if leads() else [])
        done = {(o.method, o.seed) for o in outcomes if o.failure is None}
        for seed in self.seeds:
            for name, way in ways.items():
                if (name, seed) in done:
                    continue
                folder = out / f"{name.replace(':', '-')}-{seed}"
                try:
                    with meeting(name):
                        outcome = self._one(name, way, seed, (train, validation, judging), folder)
                except RankError:
                    raise
                except Exception as error:  # a peer that fails on this model is a result too
                    said = (str(error).strip().splitlines() or [""])[0]
                    outcome = Outcome(name, seed, {}, failure=f"{type(error).__name__}: {said}")
                outcome = replace(outcome, about=self.source.record())
                outcomes = ranks.first(add(out / RUNS, setup, outcome) if leads() else [])
                print(_line(outcome), flush=True)
        return [o for o in outcomes if o.method in ways and o.seed in self.seeds]

    def _setup(self) -> JsonObject:
        """What all runs of one folder have in common."""
        found: JsonObject = {"task": self.source.name}
        files = (self.source.train_file, self.source.validation_file, self.source.config)
        found["files"] = " ".join(str(f) for f in files if f) or None
        settings = asdict(replace(self.settings, seed=0)) | asdict(replace(self.spec, seed=0))
        settings["clip"] = settings.pop("max_grad_norm")  # as on the command line, and in old files
        usual = {"new_head": False, "budget": None, "gradient_accumulation": 1}
        for key, value in (usual | {"placement": asdict(USUAL)}).items():
            if settings[key] == value:  # old files do not know them
                del settings[key]
        parts = {k: v for k, v in asdict(self.source.parts).items() if v is not None}
        found |= {f"part {k}": str(v) for k, v in parts.items()} if len(parts) > 1 else {}
        own = {"rates": dict(self.rates), "decay": self.decay, "evaluated": self.evaluated}
        return found | settings | own

    def _one(
        self,
        name: str,
        way: Method,
        seed: int,
        rows: tuple[Sequence[Example] | Examples, Sequence[Example], Sequence[Example]],
        folder: Path,
    ) -> Outcome:
        """rows: those that train, that choose the epoch, and that judge in the end."""
        train, validation, judging = rows
        settings = replace(self.settings, seed=seed)
        own = settings.drawn(train)
        classes = outputs_of(self.source.task, train, validation)
        shots = list(islice(own, way.shots))
        model, objective = replace(self.spec, seed=seed).load(self.source.task, classes, shots)
        require_same(here(), model)
        held_out = shared_by_all(objective.held_out(validation, BATCH))
        judges = shared_by_all(objective.held_out(judging, BATCH))
        if not way.trains:
            if not isinstance(objective, PromptObjective):
                raise MethodError(f"{name} asks a language model: use a decoder")
            return Outcome(name, seed, objective.evaluate(model, judges, judging))
        every = objective.training(own, settings.batch_size, seed, settings.group_by_length)
        loader = own_part(every)
        chosen, gains, start = None, None, time.perf_counter()
        if name == "auto":
            parts = settings.gradient_accumulation
            selected, choice = chosen_by_gains(model, objective, loader, seed, parts=parts)
            chosen, gains = choice.term, None if selected is None else selected.gains
        recipe, budget = settings.recipe(decay=self.decay), settings.budget
        recipe = replace(recipe, lr=self.rates.get(name, way.lr or settings.lr))
        if budget is not None and name not in self.rates:

            def fresh() -> nn.Module:
                spec = replace(self.spec, seed=seed)
                again, _ = spec.load(self.source.task, classes, shots)
                if chosen is not None:
                    prepare(again, chosen)
                return way.setup(again, seed)

            def first() -> float:
                terms = [chosen] if chosen else way.terms(model)
                if not terms:
                    return recipe.lr
                return first_rate(model, objective, loader, terms, gains, recipe)

            path, contender = folder / RACE, made_by(fresh)
            rate, _ = raced(
                path, name, contender, first, every, objective, recipe, budget, resume=True
            )
            recipe = replace(recipe, lr=rate)
        if chosen is not None:
            prepare(model, chosen)
        adapted = way.setup(model, seed)
        begun = time.perf_counter()
        loader.set_epoch(0)  # the same batch for every method
        peak = _step_peak(adapted, objective, next(b for b in loader if b), recipe)
        aside = time.perf_counter() - begun
        metric = self.source.task.metric
        reached: dict[float, dict[str, float]] = {}  # by the metric that decides

        def evaluate(tuned: nn.Module) -> float:
            metrics = objective.evaluate(tuned, held_out, validation)
            reached.setdefault(metrics[metric], metrics)
            return metrics[metric]

        progress = tune(
            adapted,
            loader,
            evaluate,
            folder,
            recipe,
            loss=objective.loss,
            metric=metric,
            resume=True,
            progress=True,
        )
        seconds = time.perf_counter() - start - aside
        # The first of the best epochs is kept; one of before a resumption was not heard of.
        best = max(record[metric] for record in progress.history)
        metrics = reached.get(best) if judging is validation else None
        metrics = metrics or objective.evaluate(adapted, judges, judging)
        if leads():
            (folder / CHECKPOINT).unlink(missing_ok=True)
        kept = kept_bytes(adapted)
        found = trained(adapted)
        return Outcome(name, seed, metrics, found, seconds, peak, kept, chosen, recipe.lr)


def rates_of(text: str) -> dict[str, float]:
    """Learning rates from 'lora=1e-3,full=1e-5'. Raises WorkflowError."""
    rates = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            rates[name] = float(value)
        except ValueError as error:
            raise WorkflowError(f"--rates: '{part}' is not METHOD=RATE") from error
        if not 0 < rates[name] < math.inf:
            raise WorkflowError(f"--rates: the rate of '{name}' must be a positive number")
    return rates


def _step_peak(
    model: nn.Module, objective: Objective, batch: Mapping[str, Tensor], recipe: Recipe
) -> int:
    """Peak memory of one training step, the optimizer's state included; nothing stays changed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise MethodError("nothing is trained")
    before = [p.detach().clone() for p in parameters]
    device = device_of(model)
    inputs = {k: v.to(device) for k, v in batch.items()}

    def step() -> None:
        optimizer = BiasAdamW(model, lr=recipe.lr)
        EagerStep(model, optimizer, objective.loss, parts=recipe.parts)(inputs, recipe.lr)

    model.train()
    peak = peak_bytes(step, device)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return peak


def summarize(outcomes: Sequence[Outcome], metrics: Sequence[str]) -> list[JsonObject]:
    """One row a method: mean and standard deviation of each metric over seeds, medians of the
    rest."""
    rows = []
    for name in dict.fromkeys(o.method for o in outcomes):
        own = [o for o in outcomes if o.method == name]
        fine = [o for o in own if o.failure is None]
        row: JsonObject = {"method": name, "seeds": len(fine)}
        row["failure"] = next((o.failure for o in own if o.failure is not None), None)
        for metric in metrics if fine else ():
            values = [o.metrics[metric] for o in fine]
            row[metric] = statistics.fmean(values)
            row[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        for key in ("parameters", "seconds", "peak", "kept") if fine else ():
            values = [v for o in fine if (v := getattr(o, key)) is not None]
            row[key] = statistics.median(values) if values else None
        row["chosen"] = sorted({o.chosen for o in fine if o.chosen})
        row["rates"] = sorted({o.lr for o in fine if o.lr})
        rows.append(row)
    return rows


def table(rows: Sequence[JsonObject], metrics: Sequence[str]) -> str:
    """``summarize``'s rows as a Markdown table."""
    heads = ["method", *metrics, "seeds", "rate", "trained", "seconds", "peak MiB", "kept KiB"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows:
        name = row["method"] + (f" ({', '.join(row['chosen'])})" if row["chosen"] else "")
        if not row["seeds"]:
            lines.append(f"| {name} | {row['failure']} |{' |' * (len(heads) - 2)}")
            continue
        cells = []
        for metric in metrics:
            spread = row[f"{metric}_sd"]
            cells.append(f"{row[metric]:.4f}" + (f" ± {spread:.4f}" if spread is not None else ""))
        peak = "" if row["peak"] is None else f"{row['peak'] / 2**20:.1f}"
        rates = ", ".join(f"{rate:.2g}" for rate in row["rates"])
        cells += [
            str(row["seeds"]),
            rates,
            f"{row['parameters']:,.0f}",
            f"{row['seconds']:.1f}",
            peak,
        ]
        cells.append(f"{row['kept'] / 1024:,.1f}")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def write(comparison: Comparison, outcomes: Sequence[Outcome], out: Path) -> str:
    """``out`` gets comparison.json, .md and .png. Returns the table."""
    from beft_ext.plots import draw, methods

    metrics = comparison.source.task.metrics
    rows = summarize(outcomes, metrics)
    tested = comparison.source.has_test
    caption = "Of test rows that no choice has seen." if tested else f"The {BEST} rows."
    found = f"{table(rows, metrics)}\n\n{caption}"
    about = comparison.source.record() | {"model": comparison.spec.model, "methods": rows}
    save_json(out / "comparison.json", about)
    with whole_file(out / "comparison.md") as temporary:
        temporary.write_text(found + "\n", encoding="utf-8")
    told = _told(comparison, outcomes, metrics[0])
    draw(methods, outcomes, metrics[0], out / "comparison.png", **told)
    return found


def _told(comparison: Comparison, outcomes: Sequence[Outcome], metric: str) -> JsonObject:
    """What the picture says beside the outcomes: model and task, a guess, the model as it is."""
    from beft_ext.plots import title_of

    source = comparison.source
    asked = [o.metrics[metric] for o in outcomes if o.method == "zero-shot" and o.failure is None]
    guessed = metric == "accuracy" and source.task.kind == "classification"
    return {
        "title": title_of(comparison.spec.model, source.called),
        "chance": 1 / outputs_of(source.task, source.training()) if guessed else None,
        "zero_shot": statistics.fmean(asked) if asked else None,
    }


def stands(out: Path) -> str:
    """What an interrupted ``beft-ext compare`` has written, and how to go on."""
    path = out / RUNS
    done = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
    return f"{path} holds {done} results: the same command goes on from there"


def require_result(outcomes: Sequence[Outcome]) -> None:
    """Raise WorkflowError where no method gave a result."""
    if all(o.failure is not None for o in outcomes):
        raise WorkflowError(f"nothing worked; the first failure: {outcomes[0].failure}")


def _line(outcome: Outcome) -> str:
    found = "  ".join(f"{k} {v:.4f}" for k, v in outcome.metrics.items())
    chosen = f" ({outcome.chosen})" if outcome.chosen else ""
    return f"{outcome.method}{chosen}, seed {outcome.seed}: {outcome.failure or found}"


def _read(path: Path, setup: JsonObject) -> list[Outcome]:
    if not path.is_file():
        return []
    outcomes = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            there, outcome = record.pop("setup"), Outcome(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise WorkflowError(f"{path} is not a file of compare: use another --out") from error
        if differing := [k for k in setup if there.get(k) != setup[k]]:
            key = differing[0]
            raise WorkflowError(
                f"{path} holds another comparison: its {key} is {there.get(key)}, here it is "
                f"{setup[key]}; use another --out"
            )
        outcomes.append(outcome)
    return outcomes


def add(path: Path, setup: JsonObject, outcome: Outcome) -> list[Outcome]:
    """All outcomes of the file, this one among them, in place of an earlier one of its kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        own = (outcome.method, outcome.seed)
        outcomes = [o for o in _read(path, setup) if (o.method, o.seed) != own]
        outcomes.append(outcome)
        with whole_file(path) as temporary:
            lines = (json.dumps(asdict(o) | {"setup": setup}) + "\n" for o in outcomes)
            temporary.write_text("".join(lines), encoding="utf-8")
    return outcomes
