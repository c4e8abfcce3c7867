"""From names and files to models, tokenizers and batches: what the verbs have in common."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beft_ext.files import whole_file
from beft_ext.models import find_biases
from beft_ext.selection import Selection, select
from beft_ext.tasks import (
    Batches,
    Columns,
    Examples,
    accuracy,
    load_task,
    predictions,
    read_file,
    subset,
)
from beft_ext.tasks.batches import check_labels
from beft_ext.tuning import Recipe, tune

EVALUATION_BATCH = 64


class WorkflowError(ValueError):
    """Arguments that do not go together, or a model that cannot be had."""


@dataclass(frozen=True)
class Source:
    """Where examples come from: a named task (``data``: its folder, else the hub) or files."""

    task: str | None = None
    data: Path | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    columns: Columns = field(default_factory=lambda: Columns("sentence"))

    def read(self, split: str) -> Examples:
        """The examples of 'train' or 'validation'. Raises DataError or WorkflowError."""
        file = self.train_file if split == "train" else self.validation_file
        if (self.task is None) == (self.train_file is None and self.validation_file is None):
            raise WorkflowError("give either --task NAME or --train-file F")
        if self.task is not None:
            return load_task(self.task, split, self.data)
        if file is None:
            raise WorkflowError(f"this needs --{split}-file F beside the other file")
        return read_file(file, self.columns)


def pretrained(model: str, auto: str, **options: Any) -> Any:
    """A transformers object by the Auto class called ``auto``. Raises WorkflowError, one line."""
    import transformers

    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise WorkflowError(f"{model}: the folder has no config.json")
    try:
        return getattr(transformers, auto).from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WorkflowError(f"model '{model}' cannot be loaded: {reason}") from error


def classifier(model: str, classes: int, seed: int) -> tuple[nn.Module, Any]:
    """A sequence classifier, its new head's weights seeded, on the GPU if there is one; and its
    tokenizer. A decoder without a padding token pads with its end of text."""
    torch.manual_seed(seed)
    tokenizer = pretrained(model, "AutoTokenizer")
    found: nn.Module = pretrained(
        model, "AutoModelForSequenceClassification", num_labels=max(2, classes)
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = found.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return found.cuda() if torch.cuda.is_available() else found, tokenizer


def classes_of(*examples: Examples) -> int:
    """Number of classes that the labels call for."""
    return max(max(e.labels) for e in examples) + 1


def write_json(path: Path, record: Any) -> None:
    """``record`` as a whole file of indented JSON; NaN is refused."""
    with whole_file(path) as temporary:
        text = json.dumps(record, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Settings:
    """The arguments that select and tune share, named as on the command line."""

    model: str
    train_size: int | None = None
    batch_size: int = 16
    epochs: int = 1
    lr: float = 1e-3
    warmup: float = 0.0
    clip: float = 1.0
    max_length: int = 128
    seed: int = 0

    @classmethod
    def of(cls, arguments: Any) -> Settings:
        """From an argparse namespace. Raises WorkflowError for a number out of range."""
        made = cls(**{f.name: getattr(arguments, f.name) for f in fields(cls)})
        for name in ("batch_size", "epochs", "max_length"):
            if getattr(made, name) < 1:
                raise WorkflowError(f"--{name.replace('_', '-')} must be at least 1")
        if not 0 < made.lr < math.inf:
            raise WorkflowError(f"--lr must be a positive number, but is {made.lr}")
        if not 0 <= made.warmup <= 1 or not 0 <= made.clip < math.inf:
            raise WorkflowError("--warmup must be within 0 and 1, --clip 0 (none) or more")
        return made

    def batches(self, examples: Examples, tokenizer: Any, classes: int) -> Batches:
        """Training batches: a seeded subset in seeded order."""
        train = subset(examples, self.train_size, self.seed)
        check_labels(train, classes)
        return Batches(train, tokenizer, self.batch_size, self.seed, self.max_length)


def run_select(
    source: Source,
    settings: Settings,
    terms: Sequence[str] | None = None,
    method: str = "beft",
    steps: int | None = None,
) -> Selection:
    """``beft-ext select``, up to the result."""
    train = source.read("train")
    if source.validation_file is not None:
        source.read("validation")  # not needed here, but better found broken before the run
    classes = classes_of(train)
    model, tokenizer = classifier(settings.model, classes, settings.seed)
    loader = settings.batches(train, tokenizer, model.config.num_labels)
    return _select(model, loader, settings, terms=terms, method=method, steps=steps)


def _select(model: nn.Module, loader: Batches, settings: Settings, **options: Any) -> Selection:
    return select(
        model,
        loader,
        epochs=settings.epochs,
        lr=settings.lr,
        warmup=settings.warmup,
        clip=settings.clip,
        seed=settings.seed,
        progress=sys.stderr.isatty(),
        **options,
    )


def run_tune(
    source: Source,
    settings: Settings,
    terms: str,
    out: Path,
    *,
    resume: bool = False,
    save_every: int = 50,
    bf16: bool = False,
    compile: bool = False,
) -> None:
    """``beft-ext tune``: ``out`` gets adapter/, log.jsonl, learning_curve.png and, for terms
    'auto', selection/. Prints what trains and each evaluation."""
    from beft_ext.adapters import save_adapter
    from beft_ext.plots import learning_curve
    from beft_ext.preparation import prepare

    train, validation = source.read("train"), source.read("validation")
    classes = max(2, classes_of(train, validation))
    model, tokenizer = classifier(settings.model, classes, settings.seed)
    loader = settings.batches(train, tokenizer, classes)
    held_out = Batches(validation, tokenizer, EVALUATION_BATCH, None, settings.max_length)
    selected = None
    if terms == "auto":
        selected = out / "selection" / "selection.json"
        if not (resume and selected.is_file()):
            found = _select(model, loader, replace(settings, epochs=1, warmup=0.0))
            print(found, "\n")
            found.save(selected.parent)
        chosen = [json.loads(selected.read_text(encoding="utf-8"))["best"]]
    else:
        chosen = list(find_biases(model).terms) if terms == "all" else terms.split(",")
    print(prepare(model, chosen), "\n")
    recipe = Recipe(
        epochs=settings.epochs,
        lr=settings.lr,
        warmup=settings.warmup,
        clip=settings.clip,
        seed=settings.seed,
        bf16=bf16,
        compile=compile,
    )
    progress = tune(
        model,
        loader,
        lambda m: accuracy(m, held_out),
        out,
        recipe,
        resume=resume,
        save_every=save_every,
        progress=sys.stderr.isatty(),
    )
    for record in progress.history:
        print("  ".join(f"{k} {v:.4g}" for k, v in record.items()))
    learning_curve(progress.history, "accuracy", out / "learning_curve.png")
    save_adapter(model, out / "adapter", selection=selected)
    print(f"\nthe adapter is in {out / 'adapter'}")


def run_evaluate(
    source: Source, model: str, adapter: Path | None, seed: int, max_length: int
) -> dict[str, Any]:
    """``beft-ext evaluate``: accuracy and every prediction, of a model with or without adapter."""
    examples = source.read("validation")
    loaded, tokenizer = _with_adapter(model, adapter, classes_of(examples), seed)
    check_labels(examples, loaded.config.num_labels)
    found = predictions(loaded, Batches(examples, tokenizer, EVALUATION_BATCH, None, max_length))
    right = sum(a == b for a, b in zip(found, examples.labels, strict=True))
    return {
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "accuracy": right / len(examples),
        "right": right,
        "examples": len(examples),
        "predictions": found,
    }


def run_merge(model: str, adapter: Path, out: Path) -> None:
    """``beft-ext merge``: ``out`` is a folder that transformers loads without us."""
    from beft_ext.adapters import merge_adapter

    loaded, tokenizer = _with_adapter(model, adapter, 2, seed=0)
    merge_adapter(loaded)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        loaded.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # The configuration last: without it the folder is no model.
        for path in sorted(Path(temporary).iterdir(), key=lambda p: p.name == "config.json"):
            path.replace(out / path.name)


def _with_adapter(model: str, adapter: Path | None, classes: int, seed: int) -> tuple[Any, Any]:
    from beft_ext.adapters import head_classes, load_adapter

    if adapter is None:
        # A folder that was trained to the end says itself how many classes it has.
        classes = pretrained(model, "AutoConfig").num_labels
    else:
        classes = head_classes(adapter) or classes
    loaded, tokenizer = classifier(model, classes, seed)
    if adapter is not None:
        load_adapter(loaded, adapter)
    return loaded, tokenizer
