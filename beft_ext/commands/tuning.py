"""``beft-ext tune``: the term is chosen, the rate raced, the term trained and the adapter saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from beft_ext.commands.loading import ModelSpec, WorkflowError, outputs_of
from beft_ext.commands.processes import own_part
from beft_ext.commands.reporting import Judged, Report
from beft_ext.commands.sources import Source
from beft_ext.commands.workflow import (
    RACE,
    Settings,
    chosen_by_gains,
    family_of,
    first_rate,
    merging,
    raced,
    tell,
    tell_late,
)
from beft_ext.errors import BeftWarning
from beft_ext.files import JsonObject, save_json
from beft_ext.models import find_biases, find_projections, pick
from beft_ext.models.offload import device_of
from beft_ext.parallel import here, leads
from beft_ext.selection import (
    ProbeError,
    Selection,
    automatic,
    dead_terms,
    read_selection,
    terms_of,
)
from beft_ext.tasks import Batches, Objective
from beft_ext.training.loss import on_device
from beft_ext.training.tuning import CHECKPOINT, tune


def run_tune(
    source: Source,
    spec: ModelSpec,
    settings: Settings,
    terms: str,
    out: Path,
    *,
    resume: bool = False,
    save_every: int = 50,
    parameters: int | None = None,
    **options: bool,
) -> None:
    """``beft-ext tune``: ``out`` gets adapter/, evaluation.json, log.jsonl, learning_curve.png, for
    terms 'auto' selection/, and for a rate that is raced audition.json. Prints what trains, where
    it sets out from and each epoch. parameters: that 'auto' may choose, at most. options: of
    Recipe."""
    from beft_ext.adapters import save_adapter
    from beft_ext.plots import draw, learning_curve, title_of
    from beft_ext.training.preparation import prepare

    train, validation, task = source.training(), source.read("validation"), source.task
    model, objective = spec.load(task, outputs_of(task, train, validation))
    every = settings.batches(objective, train)
    loader = own_part(every)
    chooser = judged = Judged.of(objective, "validation", validation, train)
    if source.has_test:
        judged = Judged.of(objective, "test", source.read("test"), train)
    tell(objective)
    selected, about = None, source.record()
    if terms == "auto":
        path = out / "selection" / "selection.json"
        terms, selected = _automatic(
            model, objective, loader, settings, path, resume, parameters, about
        )
    chosen = list(find_biases(model).terms) if terms == "all" else [terms]
    _warn_of_dead(model, objective, loader, chosen)
    recipe, race, budget = settings.recipe(**options), None, settings.budget
    if budget is not None:
        gains = None if selected is None else selected.gains
        first = partial(first_rate, model, objective, loader, chosen, gains, recipe)
        contender = terms_of(model, chosen)
        rate, race = raced(
            out / RACE, terms, contender, first, every, objective, recipe, budget, resume
        )
        print(f"{race}\n" if race else "")
        recipe = replace(recipe, lr=rate)
    print(prepare(model, chosen), "\n")
    before = judged.measure(model)
    start = before if judged is chooser else chooser.measure(model)
    print(judged.start(before))
    progress = tune(
        model,
        loader,
        lambda m: chooser.measure(m)[task.metric],
        out,
        recipe,
        loss=objective.loss,
        metric=task.metric,
        resume=resume,
        save_every=save_every,
        progress=True,
        report=_print_epoch,
    )
    tell_late(objective, loader)
    best = max(record[task.metric] for record in progress.history)
    report = Report(judged, before, judged.measure(model), best)
    about |= {"data": source.words(len(train), len(validation)), "evaluation": report.record()}
    if leads():
        save_adapter(model, out / "adapter", selection=selected, audition=race, about=about)
        save_json(out / "evaluation.json", about | {"model": spec.model, "adapter": "adapter"})
        told = {
            "title": title_of(spec.model, source.called, terms),
            "beside": chooser.beside(start),
        }
        path = out / "learning_curve.png"
        draw(learning_curve, progress.history, task.metric, path, **told)
    print(f"\n{report}\nthe adapter is in {out / 'adapter'}")


def _print_epoch(record: Mapping[str, float]) -> None:
    print("  ".join(f"{k} {v:.4g}" for k, v in record.items()))


def _warn_of_dead(
    model: nn.Module, objective: Objective, loader: Batches, terms: Sequence[str]
) -> None:
    """Say which of the terms cannot learn anything, before hours are spent on them."""
    batch = on_device(loader.collate(loader.few(4)), device_of(model))
    biases = pick([p.bias for p in find_projections(model)], terms)
    model.eval()
    try:
        dead = dead_terms(model, biases, lambda: objective.loss(model, batch))
    except ProbeError:  # then nothing is known of it
        return
    for term in dead:
        warnings.warn(
            f"term '{term}' is dead in this model: softmax ignores it, so that its gradient is "
            "zero and only what trains beside it learns; 'beft-ext select' tells which term does",
            BeftWarning,
            stacklevel=2,
        )


def _automatic(
    model: nn.Module,
    objective: Objective,
    loader: Batches,
    settings: Settings,
    path: Path,
    resume: bool,
    budget: int | None,
    about: JsonObject,
) -> tuple[str, Selection | None]:
    """The terms that are selected, and the selection, if there is one.

    ``path`` keeps the selection; a resumed run reads it there. budget: number of the terms'
    parameters, at most.
    """
    kept = here().first(read_selection(path) if resume and leads() and path.is_file() else None)
    if kept is not None:
        if kept.gains is None:
            raise WorkflowError(f"{path} has no gains: it is of another version, so start anew")
        return automatic(kept.gains, family_of(model), budget, merging(model)).term, kept
    parts = settings.gradient_accumulation
    found, choice = chosen_by_gains(model, objective, loader, settings.seed, budget, parts)
    if found is not None:
        print(found)
        if leads():
            found.save(path.parent, about)
    print(f"\nauto: '{choice.term}': {choice.reason}\n")
    return choice.term, found


def tune_stands(out: Path) -> str:
    """What an interrupted ``beft-ext tune`` has written, and how to go on."""
    if (out / CHECKPOINT).is_file():
        return f"{out / CHECKPOINT} is whole: the same command with --resume goes on from it"
    if (out / RACE).is_file():
        return f"{out / RACE} is whole: the same command with --resume trains at its rate"
    if (out / "selection" / "selection.json").is_file():
        return f"{out / 'selection'} is whole: the same command with --resume trains what it chose"
    return "nothing was written yet: start again"
