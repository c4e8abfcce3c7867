"""How a task is put to a model: by a task head or by prompts. What the two have in common."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.parallel import here
from beft_ext.tasks.batches import NONE_LEFT, Batches, Encoded, split
from beft_ext.tasks.examples import Example
from beft_ext.tasks.metrics import measure
from beft_ext.tasks.rows import DataError
from beft_ext.tasks.streams import Examples, Stream
from beft_ext.tasks.task import Task
from beft_ext.training.loss import model_loss
from beft_ext.training.observed import Observed, model_observe

AT_ONCE = 1024  # examples that the tokenizer is given together
Prediction = int | float | str  # a class or choice, a number, a text


@dataclass(frozen=True)
class Answer:
    """What a model says to one row. probabilities: of the classes or choices, in their order;
    none for a number or a text."""

    value: Prediction
    probabilities: tuple[float, ...] = ()

    @classmethod
    def of(cls, scores: Tensor) -> Answer:
        """The most likely of the classes or choices with these logits ``(C,)``."""
        return cls(int(scores.argmax()), tuple(scores.double().softmax(-1).tolist()))


class Objective(ABC):
    """Makes batches of examples, losses of batches, and predictions of a model.

    auto: name of the transformers class that the model is loaded by, with ``model_options``.
    notes: how many examples were left out or shortened, by reason.
    """

    auto: str
    model_options: dict[str, Any]  # settings of its config

    def __init__(self, task: Task) -> None:
        self.task = task
        self.notes: dict[str, int] = {}

    def training(
        self, examples: Sequence[Example] | Examples, size: int, seed: int, by_length: bool = True
    ) -> Batches:
        """Batches to train on. Raises DataError for what cannot be trained on."""
        if isinstance(examples, Examples):
            made_by = (self._learnt, self._parts, self._collate_learnt())
            return Stream(examples, *made_by, size, seed, by_length, self.notes)
        made = (row for part in split(examples, AT_ONCE) for row in self._learnt(part))
        rows = [row for row in made if row is not None]
        if examples and not rows:
            raise DataError(NONE_LEFT)
        return Batches(rows, self._collate_learnt(), size, seed, by_length)

    @abstractmethod
    def _learnt(self, examples: Sequence[Example]) -> list[Encoded | None]:
        """Rows to learn from; None for an example that is left out."""

    @abstractmethod
    def _parts(self, example: Example) -> int:
        """Of a row to learn from."""

    @abstractmethod
    def _collate_learnt(self) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
        """What makes a batch of rows to learn from."""

    @abstractmethod
    def questions(self, examples: Sequence[Example], size: int) -> Batches:
        """Batches to be answered, one row an example; labels are not looked at."""

    def held_out(self, examples: Sequence[Example], size: int) -> Batches:
        """``questions`` to evaluate on. Raises DataError where a metric cannot be had of them."""
        self._require_metrics(examples)
        return self.questions(examples, size)

    @abstractmethod
    def answers(self, model: nn.Module, rows: list[Encoded]) -> Sequence[Answer]:
        """What the model in eval mode says to each row."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """A mean over examples or, where labels are tokens, over these."""
        with _readable(model):
            return self._loss(model, batch)

    def _loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model_loss(model, batch)

    def observe(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Observed:
        """The batch example by example: ``loss`` before its mean is taken."""
        with _readable(model):
            return self._observe(model, batch)

    def _observe(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Observed:
        return model_observe(model, batch)

    def predict(self, model: nn.Module, batches: Batches) -> list[Prediction]:
        """A class, choice, number or text for each row, in the rows' order."""
        return [answer.value for answer in self.answered(model, batches)]

    @torch.no_grad()
    def answered(self, model: nn.Module, batches: Batches) -> list[Answer]:
        """The answer to each row, in the rows' order; ranks that meet share the work."""
        mode, found = model.training, dict[int, Answer]()
        plan = batches.plan()
        shares, done = -(-len(plan) // here().size), itertools.count(1)

        def answers(indices: list[int]) -> Sequence[Answer]:
            with _readable(model):
                given = self.answers(model, [batches.rows[i] for i in indices])
            batches.taken(next(done), shares)
            return given

        model.eval()
        try:
            for indices, given in zip(plan, here().map(answers, plan), strict=True):
                found |= zip(indices, given, strict=True)
        finally:
            model.train(mode)
        return [found[i] for i in range(len(batches.rows))]

    def evaluate(
        self, model: nn.Module, batches: Batches, examples: Sequence[Example]
    ) -> dict[str, float]:
        """The task's metrics; ``batches`` as ``held_out(examples)`` made them."""
        return measure(self.task.metrics, self.predict(model, batches), examples)

    def _require_metrics(self, examples: Sequence[Example]) -> None:
        """Raise DataError now, not after the training, where a metric cannot be had."""
        answer: Callable[[Example], Prediction] = {
            "generation": lambda e: e.answers[0],
            "regression": lambda e: e.label,
        }.get(self.task.kind, lambda e: e.right[0])
        try:
            measure(self.task.metrics, [answer(e) for e in examples], examples)
        except ValueError as error:  # scikit-learn's f1 of more than two classes
            if isinstance(error, BeftError):
                raise
            names = ", ".join(self.task.metrics)
            raise DataError(f"metric {names} does not suit these examples: {error}") from error

    def _note(self, what: str, count: int) -> None:
        if count:
            self.notes[what] = self.notes.get(what, 0) + count


@contextmanager
def _readable(model: nn.Module) -> Iterator[None]:
    """What a model of a folder of one's own stumbles over, as one line."""
    try:
        yield
    except BeftError:
        raise
    except (ValueError, IndexError, TypeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{type(model).__name__} cannot read this batch: {reason}") from error
