"""From names and files to examples, models and the way a task is put to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beft_ext.errors import BeftError
from beft_ext.tasks import (
    Column,
    DataError,
    Example,
    HeadObjective,
    Objective,
    PromptObjective,
    Task,
    load_task,
    named_task,
    read_rows,
    read_task,
)

ASKED = ("auto", "head", "prompt")
MOST_CLASSES = 10_000


class WorkflowError(BeftError, ValueError):
    """Arguments that do not go together, or a model that cannot be had."""


@dataclass(frozen=True)
class Source:
    """Where examples come from: a named task (``data``: its folder, else the hub) or files.

    config: a JSON file that describes a task of one's own; else text, pair and label name the
    columns of the files.
    """

    name: str | None = None
    data: Path | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    config: Path | None = None
    text: str = "sentence"
    pair: str | None = None
    label: str = "label"

    @cached_property
    def task(self) -> Task:
        """Raises DataError or WorkflowError."""
        if (self.name is None) == (self.train_file is None and self.validation_file is None):
            raise WorkflowError("give either --task NAME or --train-file F")
        if self.name is not None:
            return named_task(self.name)
        if self.config is not None:
            return read_task(self.config)
        pair = None if self.pair is None else Column(self.pair)
        return Task(text=Column(self.text), pair=pair, label=self.label)

    def read(self, split: str) -> list[Example]:
        """The examples of 'train', 'validation' or another split of a named task."""
        task = self.task
        if self.name is not None:
            return load_task(self.name, split, self.data)
        file = self.train_file if split == "train" else self.validation_file
        if file is None:
            raise WorkflowError(f"this needs --{split}-file F beside the other file")
        return task.examples(read_rows(file), str(file))


def pretrained(model: str, auto: str, **options: Any) -> Any:
    """A transformers object by the Auto class called ``auto``. Raises WorkflowError, one line."""
    import transformers

    _check_folder(model)
    try:
        found = getattr(transformers, auto).from_pretrained(model, **options)
    except Exception as error:  # a file's reader, a config's checks, the hub's client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights do not have the shapes that its config says"
        if "connect to" in reason:
            reason = "it is no folder, not in the local cache, and the hub cannot be reached"
        raise WorkflowError(f"model '{model}' cannot be loaded: {reason}") from error
    if auto == "AutoTokenizer" and set(found.get_vocab()) <= set(found.all_special_tokens):
        raise WorkflowError(f"model '{model}' has no tokenizer: its vocabulary is empty")
    return found


def _check_folder(model: str) -> None:
    """transformers takes for a name of the hub what is no folder."""
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise WorkflowError(f"{model}: the folder has no config.json")
    if path.is_file():
        raise WorkflowError(f"{model} is a file: give the folder of a model, or a hub id")
    if not path.exists() and (path.is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise WorkflowError(f"{model}: no such folder")


@dataclass(frozen=True)
class Asking:
    """How a task is put to a model. objective: 'head', 'prompt', or 'auto': prompts for a model
    that only goes from left to right, where the task has one."""

    model: str
    objective: str = "auto"
    max_length: int | None = None
    seed: int = 0

    def load(
        self, task: Task, classes: int = 2, shots: Sequence[Example] = ()
    ) -> tuple[nn.Module, Objective]:
        """The model, its new head's weights seeded, on the GPU if there is one; and the
        objective. Raises WorkflowError or DataError."""
        torch.manual_seed(self.seed)
        tokenizer = pretrained(self.model, "AutoTokenizer")
        config = pretrained(self.model, "AutoConfig")
        if tokenizer.pad_token is None:  # a decoder pads with its end of text
            tokenizer.pad_token = tokenizer.eos_token
        objective: Objective
        if self._prompts(task, config):
            objective = PromptObjective(task, tokenizer, config, self.max_length, shots)
            if not (goes_left_to_right(config) or getattr(config, "is_decoder", False)):
                raise WorkflowError(
                    f"prompts need a language model, and '{self.model}' is a {config.model_type}, "
                    "which does not go from left to right: take a decoder, or a task for a head"
                )
        else:
            limit = getattr(config, "max_position_embeddings", None)
            objective = HeadObjective(task, tokenizer, classes, self.max_length, limit)
        return load_model(
            self.model, objective.auto, tokenizer, **objective.model_options
        ), objective

    def _prompts(self, task: Task, config: Any) -> bool:
        if self.objective != "auto":
            return self.objective == "prompt"
        needed = task.kind == "generation"
        return needed or (bool(task.prompt) and goes_left_to_right(config))


def load_model(model: str, auto: str, tokenizer: Any, **options: Any) -> nn.Module:
    """A model that knows its padding token, on the GPU if there is one."""
    found: nn.Module = pretrained(model, auto, **options)
    config: Any = found.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return found.cuda() if torch.cuda.is_available() else found


def goes_left_to_right(config: Any) -> bool:
    """True for a decoder: a type with a causal language model and no masked one."""
    from transformers.models.auto import modeling_auto as auto

    causal = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    others = (
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    return causal and not any(config.model_type in names for names in others)


def classes_of(*examples: Sequence[Example]) -> int:
    """Number of classes that the labels call for. Raises DataError where no head has so many."""
    largest = int(max(e.label for part in examples for e in part))
    if largest >= MOST_CLASSES:
        raise DataError(
            f"label {largest} asks for a head of {largest + 1} classes, at most {MOST_CLASSES} are "
            "made: number the classes from 0"
        )
    return largest + 1
