"""Tasks put to a model with a task head: classification, regression, multiple choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from beft_ext.models.offload import device_of
from beft_ext.tasks.batches import Batches, Encoded, split
from beft_ext.tasks.examples import Example
from beft_ext.tasks.objective import AT_ONCE, Answer, Objective
from beft_ext.tasks.reading import reading
from beft_ext.tasks.rows import DataError
from beft_ext.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_TEXT = 128  # as the authors' code; batches are as long as their own longest text


class HeadObjective(Objective):
    """``AutoModelForSequenceClassification``, or ``AutoModelForMultipleChoice`` for choices.

    Args:
        task: of any kind but generation.
        tokenizer: of the model.
        classes: outputs of the head, where the task does not name its classes.
        max_length: of a text in tokens; at most what the model and its tokenizer allow.
        model: that will read the batches; one on the meta device suffices. Without it, its
            padding, longest input and arguments are taken to be the tokenizer's.

    Raises: DataError for a task that generates text, and a length without room for text.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        classes: int = 2,
        max_length: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(task)
        if task.kind == "generation":
            raise DataError("a task that generates text needs a language model: use a decoder")
        self.tokenizer, self.reading = tokenizer, reading(model, tokenizer)
        self.longest = min(max_length or LONGEST_TEXT, self.reading.longest or LONGEST_TEXT)
        paired = task.pair is not None or task.kind == "choice"
        markers = tokenizer.num_special_tokens_to_add(pair=paired)
        if self.longest <= markers:
            raise DataError(
                f"--max-length {self.longest} leaves no room for text: {markers} tokens are markers"
            )
        self.auto, self.model_options = _head(task, classes)

    def questions(self, examples: Sequence[Example], size: int) -> Batches:
        rows = [row for part in split(examples, AT_ONCE) for row in self._encode(part)]
        return Batches(rows, self._collate, size)

    def answers(self, model: nn.Module, rows: list[Encoded]) -> Sequence[Answer]:
        device = device_of(model)
        batch = {k: v.to(device) for k, v in self._collate(rows).items() if k != "labels"}
        logits = model(**batch).logits.float()
        if self.task.kind == "regression":
            return [Answer(value) for value in logits.view(-1).tolist()]
        return [Answer.of(scores) for scores in logits.cpu()]

    def _learnt(self, examples: Sequence[Example]) -> list[Encoded | None]:
        return [*self._encode(examples)]

    def _parts(self, example: Example) -> int:
        return len(example.options) if self.task.kind == "choice" else 1

    def _collate_learnt(self) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
        return self._collate

    def _encode(self, examples: Sequence[Example]) -> list[Encoded]:
        outputs = self.model_options.get("num_labels", 1)
        for example in examples:
            if self.task.kind == "classification" and example.label >= outputs:
                raise DataError(
                    f"label {example.label:.0f} does not fit a head of {outputs} classes "
                    f"(0..{outputs - 1})"
                )
        choice = self.task.kind == "choice"
        pairs = [(e.text, p) for e in examples for p in (e.options if choice else (e.pair,))]
        tokens = iter(self._tokens(pairs))
        rows = []
        for example in examples:
            parts = list(islice(tokens, self._parts(example)))
            length = max(len(p["input_ids"]) for p in parts)
            rows.append(Encoded(parts, example.label, length, len(parts), example.group))
        return rows

    def _tokens(self, pairs: Sequence[tuple[str, str | None]]) -> list[dict[str, list[int]]]:
        """Of each text and what stands beside it. An empty text beside is none, whatever others
        have."""
        paired = iter(self._together([pair for pair in pairs if pair[1]]))
        single = iter(self._together([(text,) for text, second in pairs if not second]))
        return [next(paired if second else single) for _, second in pairs]

    def _together(self, texts: Sequence[tuple[str | None, ...]]) -> list[dict[str, list[int]]]:
        if not texts:
            return []
        given = map(list, zip(*texts, strict=True))
        found = dict(self.tokenizer(*given, truncation=True, max_length=self.longest))
        long = sum(len(ids) >= self.longest for ids in found["input_ids"])
        self._note(f"texts as long as --max-length {self.longest} or cut there", long)
        rows = zip(*found.values(), strict=True)
        return [self.reading.row(dict(zip(found, row, strict=True))) for row in rows]

    def _collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """``(B, T)``, or ``(B, C, T)`` for choices; labels ``(B,)``."""
        parts = [p for row in rows for p in row.fields]
        batch = self.reading.batch(parts)
        if self.task.kind == "choice":
            batch = {k: v.view(len(rows), -1, v.shape[-1]) for k, v in batch.items()}
        number = torch.float32 if self.task.kind == "regression" else torch.long
        return batch | {"labels": torch.tensor([row.label for row in rows], dtype=number)}


def _head(task: Task, classes: int) -> tuple[str, dict[str, Any]]:
    """The transformers class for a task, and what its config must say, whatever another task
    left there."""
    if task.kind == "choice":
        return "AutoModelForMultipleChoice", {}
    options: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if task.kind == "classification":
        number = max(2, len(task.classes) or classes)
        options = {"num_labels": number, "problem_type": "single_label_classification"}
    return "AutoModelForSequenceClassification", options
