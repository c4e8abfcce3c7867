"""Tasks put to a language model by prompts: options ranked by log-likelihood, or text generated.

What the model says next is compared with each option by the mean log-probability of the
option's tokens, as the paper does for OPT. A row holds a prompt and an option but for its last
token; where all options are one token long, one row serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from beft_ext.models.offload import device_of
from beft_ext.tasks.batches import Batches, Encoded, padded, split
from beft_ext.tasks.decoding import greedy, shared_prompt_scores
from beft_ext.tasks.examples import Example
from beft_ext.tasks.objective import AT_ONCE, Answer, Objective
from beft_ext.tasks.reading import reading
from beft_ext.tasks.rows import DataError
from beft_ext.tasks.task import Task
from beft_ext.training.counted import log_probabilities, logits_at
from beft_ext.training.observed import Observed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_PROMPT = 2048  # tokens of prompt and answer, where the model's own limit is not lower
SEPARATOR = "\n\n"  # between the examples of a prompt
NEW_TOKENS = 50  # new tokens at most, as in the authors' code


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt, and of each option (for generation: of the answer to be learnt)."""

    prompt: list[int]
    options: list[list[int]]

    @property
    def single(self) -> bool:
        """True where each option is one token."""
        return all(len(option) == 1 for option in self.options)


class PromptObjective(Objective):
    """``AutoModelForCausalLM`` with the task's prompt.

    Prompts that are too long lose their beginning. An option or answer that does not fit beside
    one token of prompt is an error; in training its example is left out and counted in
    ``notes``.

    Args:
        task: with a prompt.
        tokenizer: of the model.
        model: that will read the batches; one on the meta device suffices.
        max_length: of prompt and answer in tokens; at most what the model and its tokenizer
            allow.
        shots: examples to stand before each prompt.
        new_tokens: at most, of a generated answer.

    Raises: DataError for a task without a prompt, or without options to choose from.
    """

    auto = "AutoModelForCausalLM"

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        model: nn.Module,
        max_length: int | None = None,
        shots: Sequence[Example] = (),
        new_tokens: int = NEW_TOKENS,
    ) -> None:
        super().__init__(task)
        if not task.prompt or task.kind == "regression":
            raise DataError("this task has no prompt: use a model with a task head")
        if task.kind != "generation" and not task.options:
            raise DataError(
                "this task has a prompt and no 'options': give what the model may say, one for "
                "each class"
            )
        self.reading = reading(model, tokenizer)
        self.longest = min(max_length or LONGEST_PROMPT, self.reading.longest or LONGEST_PROMPT)
        self.tokenizer, self.model_options = tokenizer, {}
        self.new_tokens = max(1, min(new_tokens, self.longest // 2))
        ids = tokenizer("")["input_ids"]
        self.bos = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
        self.pad = self.reading.fill["input_ids"]
        self.shots = "".join(s.prompt + self._spoken(s) + SEPARATOR for s in shots)

    @property
    def _ranked(self) -> bool:
        """Whether what is learnt is to rank the options."""
        return self.task.kind != "generation" and self.task.learn == "options"

    def _learnt(self, examples: Sequence[Example]) -> list[Encoded | None]:
        ranked = self._ranked
        said = [e.options if ranked else (self._spoken(e),) for e in examples]
        found = self._encode(examples, ranked, said)
        rows = [None if isinstance(row, _TooLong) else row for row in found]
        left_out = "examples left out: the answer is longer than the model's input"
        self._note(left_out, rows.count(None))
        return rows

    def _parts(self, example: Example) -> int:
        return len(example.options) if self._ranked else 1

    def _collate_learnt(self) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
        return self.options if self._ranked else self._spelled

    def questions(self, examples: Sequence[Example], size: int) -> Batches:
        options = self.task.kind != "generation"
        rows = []
        for part in split(examples, AT_ONCE):
            for row in self._encode(part, options, [e.options if options else () for e in part]):
                if isinstance(row, _TooLong):
                    raise DataError(f"{row} is longer than the model's input") from row
                rows.append(row)
        return Batches(rows, self.options if options else self._spelled, size)

    def answers(self, model: nn.Module, rows: list[Encoded]) -> Sequence[Answer]:
        if self.task.kind == "generation":
            prompts = [row.fields.prompt for row in rows]
            said = greedy(model, self.tokenizer, prompts, self.new_tokens)
            return [Answer(text) for text in said]
        if hasattr(model, "peft_config"):  # a learned prefix: its cache is not ours to copy
            batch = {k: v.to(device_of(model)) for k, v in self.options(rows).items()}
            scores = option_scores(model, batch).tolist()
        else:
            pairs = [(row.fields.prompt, row.fields.options) for row in rows]
            scores = shared_prompt_scores(model, pairs, self.pad)
        return [Answer.of(torch.tensor(s, dtype=torch.float64)) for s in scores]

    def _loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy over the options' scores; the model's own for teacher forcing."""
        if "options" not in batch:
            return super()._loss(model, batch)
        return nn.functional.cross_entropy(option_scores(model, batch), batch["labels"])

    def _observe(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Observed:
        if "options" not in batch:
            return super()._observe(model, batch)
        return Observed.of_classes(option_scores(model, batch), batch["labels"])

    def options(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` ``(B, R, T)``, R the options or 1 where these are
        single tokens; ``options``, ``option_mask`` ``(B, C, O)``; ``start`` ``(B,)``, where the
        first of an option's tokens is predicted; ``labels`` ``(B,)``."""
        prompts = [row.fields for row in rows]
        single = all(p.single for p in prompts)
        texts = [
            p.prompt + o[:-1] for p in prompts for o in (p.options[:1] if single else p.options)
        ]
        options = [o for p in prompts for o in p.options]
        count = len(rows)
        masks = [[1] * len(t) for t in texts], [[1] * len(o) for o in options]
        return {
            "input_ids": padded(texts, self.pad).view(count, len(texts) // count, -1),
            "attention_mask": padded(masks[0], 0).view(count, len(texts) // count, -1),
            "options": padded(options, 0).view(count, len(options) // count, -1),
            "option_mask": padded(masks[1], 0).view(count, len(options) // count, -1),
            "start": torch.tensor([len(p.prompt) - 1 for p in prompts]),
            "labels": torch.tensor([int(row.label) for row in rows]),
        }

    def _spelled(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """``(B, T)`` prompt and answer; only the answer's tokens are labels."""
        pairs = [(row.fields.prompt, row.fields.options[0]) for row in rows]
        return {
            "input_ids": padded([p + a for p, a in pairs], self.pad),
            "attention_mask": padded([[1] * len(p + a) for p, a in pairs], 0),
            "labels": padded([[-100] * len(p) + a for p, a in pairs], -100),
        }

    def _spoken(self, example: Example) -> str:
        """The right continuation of the prompt."""
        if self.task.kind == "generation":
            return f" {example.answers[0]}\n"
        return example.options[int(example.label)]

    def _encode(
        self, examples: Sequence[Example], ranked: bool, said: Sequence[Sequence[str]]
    ) -> list[Encoded | _TooLong]:
        """A row of each example, with what may be said after its prompt."""
        texts = [self.shots + example.prompt for example in examples]
        prompts = self._ids([text.rstrip(" ") for text in texts])
        wholes = iter(self._ids([t + o for t, own in zip(texts, said, strict=True) for o in own]))
        rows: list[Encoded | _TooLong] = []
        for example, text, prompt, own in zip(examples, texts, prompts, said, strict=True):
            options = [self._continuation(prompt, next(wholes), text, o) for o in own]
            rows.append(self._row(example, ranked, prompt, own, options))
        return rows

    def _row(
        self,
        example: Example,
        ranked: bool,
        prompt: list[int],
        said: Sequence[str],
        options: list[list[int]],
    ) -> Encoded | _TooLong:
        if any(not option for option in options):
            raise DataError(f"an option of '{example.prompt[-40:]}' has no token of its own")
        after = max((len(option) for option in options), default=self.new_tokens)
        room = self.longest - len(self.bos) - after
        if room < 1:
            longest = max(said, key=len, default="")[:40]
            return _TooLong(f"option '{longest}'" if said else f"an answer of {after} tokens")
        if len(prompt) > room:
            self._note(f"prompts shortened to the last {room} tokens or fewer", 1)
            prompt = prompt[-room:]
        encoded = Prompt(self.bos + prompt or [self.reading.start], options)
        parts = len(options) if ranked else 1
        return Encoded(encoded, example.label, len(encoded.prompt) + after, parts, example.group)

    def _continuation(
        self, prompt: list[int], whole: list[int], text: str, option: str
    ) -> list[int]:
        """Tokens of ``option`` after ``text``, whose own are ``prompt``; whole: of both."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # Its first letters and the prompt's last became one token: it speaks for itself.
        (alone,) = self._ids([text[len(text.rstrip(" ")) :] + option])
        return alone

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids


class _TooLong(Exception):
    """An option or answer that leaves no room for a prompt."""


def option_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean log-probability of each option's tokens after the prompt, ``(B, C)``, in fp32 at least.

    batch: as ``PromptObjective.options`` makes it. Only the logits of the positions that
    predict a token of an option are computed.
    """
    ids, options = batch["input_ids"], batch["options"]
    (count, texts, tokens), (_, choices, longest) = ids.shape, options.shape
    place = batch["start"][:, None] + torch.arange(longest, device=ids.device)  # (B, O)
    place = place.clamp(max=tokens - 1)  # beyond the row only where the mask is zero
    row = torch.arange(count * texts, device=ids.device).view(count, texts, 1)
    at = row * tokens + place[:, None]  # (B, R, O)
    inputs = {
        "input_ids": ids.flatten(0, 1),
        "attention_mask": batch["attention_mask"].flatten(0, 1),
    }
    logits, _ = logits_at(model, inputs, at.flatten(), use_cache=False)
    each = (count, texts, choices // texts, longest)  # a text is of one option, or of all
    said = options.view(each).transpose(2, 3)
    logs = log_probabilities(logits, said.reshape(at.numel(), -1))
    found = logs.view(said.shape).transpose(2, 3).reshape(options.shape)
    mask = batch["option_mask"]
    return (found * mask).sum(-1) / mask.sum(-1)
