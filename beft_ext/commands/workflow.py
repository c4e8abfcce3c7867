"""``beft-ext``'s verbs select, evaluate and merge, and what tune and compare have in common."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from beft_ext.commands.answering import answering
from beft_ext.commands.loading import (
    Folder,
    ModelSpec,
    WorkflowError,
    goes_left_to_right,
    outputs_of,
)
from beft_ext.commands.placement import USUAL, Placement, shard_size
from beft_ext.commands.processes import own_part, shared_by_all
from beft_ext.commands.reporting import BATCH
from beft_ext.commands.sources import Source
from beft_ext.commands.watched import watched
from beft_ext.files import JsonObject, whole_files
from beft_ext.gains import GainError
from beft_ext.models import find_projections
from beft_ext.parallel import here, leads
from beft_ext.selection import (
    GAIN,
    Audition,
    Choice,
    Contender,
    Gains,
    NoRaceError,
    Selection,
    audition,
    automatic,
    by_prior,
    measure_gains,
    rate_of_step,
    rates_around,
    read_audition,
    select,
)
from beft_ext.selection.run import require_same
from beft_ext.tasks import Batches, Example, Objective, subset
from beft_ext.tasks.metrics import measure
from beft_ext.tasks.streams import Examples, Stream
from beft_ext.training.tuning import Recipe

RACE = "audition.json"


@dataclass(frozen=True)
class Settings:
    """The arguments that select and tune share, named as on the command line.

    budget: of the audition that finds the rate, in epochs' time; None for ``lr`` as it is.
    """

    train_size: int | None = None
    batch_size: int = 16
    epochs: int = 1
    lr: float = 1e-3
    warmup: float = 0.0
    max_grad_norm: float = 1.0
    group_by_length: bool = True
    seed: int = 0
    budget: float | None = None
    gradient_accumulation: int = 1

    @classmethod
    def of(cls, arguments: Namespace) -> Settings:
        """From an argparse namespace. Raises WorkflowError for a number out of range."""
        names = {f.name for f in fields(cls)}
        given = {name: value for name, value in vars(arguments).items() if name in names}
        if given["lr"] is None:  # 'auto'
            given |= {"lr": cls.lr, "budget": arguments.audition_budget}
        made = cls(**given)
        for name in ("batch_size", "gradient_accumulation", "epochs"):
            if getattr(made, name) < 1:
                raise WorkflowError(f"--{name.replace('_', '-')} must be at least 1")
        if not 0 < made.lr < math.inf:
            raise WorkflowError(f"--lr must be a positive number, but is {made.lr}")
        if not 0 <= made.warmup <= 1 or not 0 <= made.max_grad_norm < math.inf:
            raise WorkflowError("--warmup must be within 0 and 1, --clip 0 (none) or more")
        if made.budget is not None and not 0 < made.budget < math.inf:
            raise WorkflowError(f"--audition-budget must be positive, but is {made.budget}")
        return made

    def recipe(self, **options: bool) -> Recipe:
        """What tune is told."""
        clip = self.max_grad_norm
        own = (self.epochs, self.lr, self.warmup, 0.0, clip, self.seed)
        return Recipe(*own, parts=self.gradient_accumulation, **options)

    def drawn(self, train: Sequence[Example] | Examples) -> Sequence[Example] | Examples:
        """The examples that train, of all: as many as are asked for."""
        if isinstance(train, Examples):
            return train.subset(self.train_size, self.seed)
        return subset(train, self.train_size, self.seed)

    def batches(self, objective: Objective, examples: Sequence[Example] | Examples) -> Batches:
        """Training batches: a seeded subset in seeded order."""
        train = self.drawn(examples)
        return objective.training(train, self.batch_size, self.seed, self.group_by_length)


def run_select(
    source: Source,
    spec: ModelSpec,
    settings: Settings,
    terms: str | None = None,
    method: str = GAIN,
    steps: int | None = None,
) -> Selection:
    """``beft-ext select``, up to the result."""
    train = source.training()
    if source.validation_file is not None:
        source.read("validation")  # not needed here, but better found broken before the run
    model, objective = spec.load(source.task, outputs_of(source.task, train))
    loader = own_part(settings.batches(objective, train)).with_groups()
    tell(objective)
    found = select(
        model,
        loader,
        method,
        loss=objective.loss,
        observe=objective.observe,
        terms=terms,
        groups=loader.grouped,
        epochs=settings.epochs,
        steps=steps,
        lr=settings.lr,
        warmup=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        parts=settings.gradient_accumulation,
        seed=settings.seed,
        progress=True,
    )
    tell_late(objective, loader)
    return found


def chosen_by_gains(
    model: nn.Module,
    objective: Objective,
    loader: Batches,
    seed: int,
    budget: int | None = None,
    parts: int = 1,
) -> tuple[Selection | None, Choice]:
    """What 'auto' trains, by the gains of all terms, before any training; by the prior, and
    without a selection, where the examples tell nothing. budget: of parameters, at most. parts:
    that batches are read in."""
    family = family_of(model)
    try:
        found = select(
            model,
            loader.with_groups(),
            observe=objective.observe,
            groups=loader.grouped,
            steps=0,
            parts=parts,
            seed=seed,
            progress=True,
        )
    except GainError as error:
        terms = [p.bias.term for p in find_projections(model)]
        return None, by_prior(terms, family, str(error))
    assert found.gains is not None
    return found, automatic(found.gains, family, budget, merging(model))


def merging(model: nn.Module) -> set[str]:
    """Terms that merge into the plain model."""
    from beft_ext.adapters import term_facts

    return {fact.term for fact in term_facts(model) if fact.merges}


def family_of(model: nn.Module) -> str:
    """The kind of model that a prior is known for."""
    config = getattr(model, "config", None)
    both = getattr(config, "is_encoder_decoder", False)
    return "other" if config is None or both or goes_left_to_right(config) else "encoder"


def raced(
    path: Path,
    name: str,
    contender: Contender,
    first: Callable[[], float],
    loader: Batches,
    objective: Objective,
    recipe: Recipe,
    budget: float,
    resume: bool,
) -> tuple[float, Audition | None]:
    """The rate to train at, and the race of ``contender`` at the rates around the ``first`` that
    told it. ``path`` keeps the race; where a run is resumed, it is read from there.

    Where rows or budget allow no race, the rate is the ``first``, and the screen says why.
    """
    kept = here().first(read_audition(path) if resume and leads() and path.is_file() else None)
    if kept is not None and kept.best == name:
        return kept.rate, kept
    center = first()
    try:
        found = audition(
            {name: contender},
            loader.at_hand(),
            rates_around(center),
            loss=objective.loss,
            losses=lambda model, batch: objective.observe(model, batch).means,
            recipe=recipe,
            budget=budget,
            seed=recipe.seed,
            progress=True,
        )
    except NoRaceError as error:
        print(f"'{name}' trains at {center:.2g}, and no rates are raced: {error}")
        return center, None
    if leads():
        found.save(path)
    return found.rate, found


def first_rate(
    model: nn.Module,
    objective: Objective,
    loader: Batches,
    terms: Sequence[str],
    gains: Gains | None,
    recipe: Recipe,
) -> float:
    """Where the race for a rate sets out: what suits the term that needs the smallest steps, or
    the recipe's rate where the examples tell nothing."""
    if gains is None:
        try:
            gains = measure_gains(
                model,
                loader.with_groups(),
                observe=objective.observe,
                terms=terms,
                groups=loader.grouped,
                parts=recipe.parts,
                progress=True,
            )
        except GainError:
            return recipe.lr
    steps = {t.partition("@")[0]: step for t, step in gains.steps.items()}
    names = {entry.partition("@")[0] for text in terms for entry in text.split("+")}
    # A dead term has no step, and any rate suits it.
    return min((rate_of_step(steps[n]) for n in names if steps.get(n)), default=recipe.lr)


def tell(objective: Objective) -> None:
    """Say how many examples were left out or shortened."""
    for what, count in objective.notes.items():
        print(f"note: {count} {what}", file=sys.stderr)


def tell_late(objective: Objective, loader: Batches) -> None:
    """``tell`` of a stream, whose rows became tokens as they were due."""
    if isinstance(loader, Stream):
        tell(objective)


def run_evaluate(
    source: Source, spec: ModelSpec, adapter: Path | None, split: str | None = None
) -> JsonObject:
    """``beft-ext evaluate``: metrics and every prediction, of a model with or without adapter."""
    split = split or ("test" if source.has_test else "validation")
    source, model, objective = answering(source, spec, adapter)
    examples, task = source.read(split), source.task
    require_same(here(), model)
    held_out = shared_by_all(objective.held_out(examples, BATCH))
    tell(objective)
    found = objective.predict(model, watched(held_out, "evaluation"))
    return source.record() | {
        "model": spec.model,
        "adapter": None if adapter is None else str(adapter),
        "classes": list(task.classes),
        "rows": split,
        "metrics": measure(task.metrics, found, examples),
        "examples": len(examples),
        "predictions": found,
    }


def run_merge(model: str, adapter: Path, out: Path, placement: Placement = USUAL) -> None:
    """``beft-ext merge``: ``out`` is a folder that transformers loads without us. Of a model that
    is offloaded, one file of it at a time is in memory."""
    from beft_ext.adapters import (
        class_names,
        head_classes,
        load_adapter,
        merge_adapter,
        model_class,
    )

    _check_out(model, out)
    classes, folder = head_classes(adapter), Folder.of(model)
    tokenizer, decoder = folder.tokenizer, goes_left_to_right(folder.config)
    auto = "AutoModelForCausalLM" if decoder else "AutoModelForSequenceClassification"
    auto = model_class(adapter) or auto
    options: dict[str, Any] = {"num_labels": classes, "problem_type": None} if classes else {}
    names = class_names(adapter)
    options |= {"classes": names, "placement": placement}
    loaded = folder.load(auto, new_head=classes is not None, **options)
    load_adapter(loaded, adapter)
    merge_adapter(loaded)
    # The configuration last: without it the folder is no model.
    with whole_files(out, last="config.json") as temporary:
        try:
            loaded.save_pretrained(temporary, max_shard_size=shard_size(loaded))
            tokenizer.save_pretrained(temporary)
        except Exception as error:  # each library has its own for a full disk
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WorkflowError(
                f"the model could not be written to {out} ({reason}); what was there is as it was"
            ) from error
        new = {p.name for p in temporary.iterdir()}
        if left := sorted(p.name for p in out.glob("*") if _is_weights(p) and p.name not in new):
            raise WorkflowError(
                f"{out} holds '{left[0]}' of another model, which would be mixed with the new one: "
                "give an empty folder"
            )


def _check_out(model: str, out: Path) -> None:
    if out.resolve() == Path(model).resolve():
        raise WorkflowError(f"{out} is the folder of the model itself: give another --out")
    if (out / "adapter_config.json").exists():
        raise WorkflowError(
            f"{out} holds an adapter, beside which a model is not read as one: give another --out"
        )


def _is_weights(path: Path) -> bool:
    endings = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    return path.name.endswith(endings)
