"""Batches of a tokenizer's making, each padded to its own longest text, seeded order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.tasks.data import DataError, Examples


class Batches:
    """A loader of ``{input_ids, attention_mask, ..., labels}``; every pass draws a new order.

    The orders follow from ``seed`` and the number of the pass alone (``set_epoch`` sets it);
    ``seed=None`` keeps the order of the rows.
    """

    def __init__(
        self, examples: Examples, tokenizer: Any, size: int, seed: int | None, longest: int = 128
    ) -> None:
        texts = [examples.texts] if examples.pairs is None else [examples.texts, examples.pairs]
        self._rows = tokenizer(*texts, truncation=True, max_length=longest)
        self._labels, self._tokenizer = torch.tensor(examples.labels), tokenizer
        self._size, self._seed, self._passes = size, seed, 0

    @property
    def labels(self) -> list[int]:
        """Labels in the order of the rows."""
        return self._labels.tolist()

    def __len__(self) -> int:
        return -(-len(self._labels) // self._size)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number ``epoch``, as with torch's DistributedSampler."""
        self._passes = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.arange(len(self._labels))
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._passes)
            order = torch.randperm(len(order), generator=generator)
            self._passes += 1
        for rows in order.split(self._size):
            fields = {k: [v[i] for i in rows.tolist()] for k, v in self._rows.items()}
            batch = dict(self._tokenizer.pad(fields, return_tensors="pt"))
            yield batch | {"labels": self._labels[rows]}


def check_labels(examples: Examples, classes: int) -> None:
    """Raise DataError where a label has no output in a head of ``classes``."""
    largest = max(examples.labels)
    if largest >= classes:
        raise DataError(
            f"label {largest} does not fit a head of {classes} classes (0..{classes - 1})"
        )


@torch.no_grad()
def predictions(model: nn.Module, batches: Batches) -> list[int]:
    """The class of the largest logit of each example; the model's mode is put back."""
    mode, found = model.training, []
    model.eval()
    device = next(model.parameters()).device
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        found += model(**inputs).logits.argmax(-1).tolist()
    model.train(mode)
    return found


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of examples that are predicted right; ``batches`` in the order of the rows."""
    found, labels = predictions(model, batches), batches.labels
    return sum(a == b for a, b in zip(found, labels, strict=True)) / len(labels)
