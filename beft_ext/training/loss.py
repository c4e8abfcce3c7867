"""What a training step minimises, what it is a mean of, and where its examples are.

The divisor of a loss is measured, not guessed. Of a sum over examples, the gradient of two rows
together is the sum of their gradients alone. So the loss is taken on two rows of a batch, together
and alone; its divisor is the one among the known ones that makes the gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.models.modes import quiet
from beft_ext.models.wrappers import called
from beft_ext.training.counted import IGNORED_LABEL, counted_losses

Batch = Mapping[str, Any]  # a model's arguments: tensors, and whatever else it takes
Measure = Callable[[Batch], float | None]
Kind = tuple[bool, bool]  # of a batch: rows left out of the loss, labels counted by the Trainer
# A scalar; the losses of the examples (B,); or a scalar and what the sum was divided by.
LossValue: TypeAlias = Tensor | tuple[Tensor, Tensor | float]
Loss = Callable[[nn.Module, Batch], LossValue]

LABELS_KEPT = 4  # labels of a row that stay where divisors are told apart


class LossError(BeftError, ValueError):
    """A loss of which it cannot be told what it is a mean of."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What a transformers model gives out beside its logits when the batch has labels.

    Where most labels of texts do not count, its output layer is spared the positions that predict
    none; the loss is the same but for rounding.

    Raises: LossError where it gives none.
    """
    model = called(model)
    found = counted_losses(model, batch)
    if found is None:
        return loss_of(model(**batch))
    losses, counts = found
    return losses.sum() / counts.sum()


def loss_of(output: object) -> Tensor:
    """The output's loss. Raises LossError where it has none."""
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise LossError(
            "the model gives no loss: the batches need 'labels' and the model a head for them, or "
            "pass a loss of your own"
        )
    return loss


def scalar(value: LossValue) -> Tensor:
    """What is minimised: the mean of ``(B,)`` losses, the first of a loss and its divisor."""
    loss: Tensor = value[0] if isinstance(value, tuple) else value
    return loss.mean() if loss.ndim else loss


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch, its tensors on ``device``."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def rows_of(batch: Batch) -> int:
    """Rows of the labels or, without any, of the first tensor."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim}
    if not tensors:
        raise LossError("a batch needs a tensor whose first axis holds the examples")
    return len(tensors.get("labels", next(iter(tensors.values()))))


def first_rows(batch: Batch, count: int) -> dict[str, Any]:
    """The batch's first rows; what has no row for each example stays."""
    return rows_between(batch, 0, count)


def rows_between(batch: Batch, first: int, last: int) -> dict[str, Any]:
    """The batch's rows from ``first`` to ``last``, which is left out; the rest stays."""
    rows = rows_of(batch)
    return {
        k: v[first:last] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
        for k, v in batch.items()
    }


def offsets_of(batch: Batch) -> Tensor | None:
    """``(B + 1,)``: where the texts of a packed batch begin; None where each row is an example.

    Told by ``cu_seq_lens_q`` or by ``position_ids`` ``(rows, T)`` that start anew within a row.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) > 1:
        return None  # a label a row
    given = batch.get("cu_seq_lens_q", batch.get("cu_seq_lens"))
    if isinstance(given, Tensor):
        return given.flatten().long()
    places = batch.get("position_ids")
    if not isinstance(places, Tensor) or places.ndim != 2:
        return None
    starts = torch.ones_like(places, dtype=torch.bool)
    starts[:, 1:] = places[:, 1:] != places[:, :-1] + 1
    if int(starts.sum()) == len(places):
        return None
    begin = starts.flatten().nonzero().flatten()
    return torch.cat([begin, begin.new_tensor([places.numel()])])


def examples_of(batch: Batch, offsets: Tensor | None) -> int:
    """B: the rows or, of a packed batch, the texts that have a label."""
    if offsets is None:
        return rows_of(batch)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.numel() != int(offsets[-1]):
        return len(offsets) - 1
    counted = labels.flatten().ne(IGNORED_LABEL).long().cumsum(0)
    ends = torch.cat([counted.new_zeros(1), counted])[offsets]
    return int(ends.diff().gt(0).sum())


def items_given(batch: Batch) -> float | None:
    """The number of labels that the Trainer counted over accumulated batches."""
    items = batch.get("num_items_in_batch")
    return None if items is None else float(items)


def one(_batch: Batch) -> float:
    """The divisor of a sum, however many rows a batch has."""
    return 1.0


def _next_labels(batch: Batch) -> float | None:
    """Labels that count where a model predicts the next one: all but the first of each row."""
    labels = batch.get("labels")
    if labels is None or labels.ndim < 2 or labels.is_floating_point() or labels.shape[-1] < 2:
        return None
    return float(labels[..., 1:].ne(IGNORED_LABEL).sum())


def _labels(batch: Batch) -> float | None:
    """Labels that count; of several targets an example ``(B, C)``, floats, all."""
    labels = batch.get("labels")
    if labels is None:
        return None
    return float(labels.numel() if labels.is_floating_point() else labels.ne(IGNORED_LABEL).sum())


# What the sum of the examples' losses may have been divided by. Where two differ by a constant
# factor alone the first is taken, by which an example's loss is the sum over its labels.
DIVISORS: tuple[Measure, ...] = (
    items_given,
    _next_labels,
    _labels,
    lambda batch: float(rows_of(batch)),
    one,
)


class Divisor:
    """What the sum of a batch's losses of examples is divided by.

    Args:
        loss: of a model and a batch.
        parameters: their gradients are compared, and some must not be zero. Pass the head and
            the model's vectors; the candidate biases alone may be dead.
    """

    def __init__(self, loss: Loss, parameters: Sequence[Tensor]) -> None:
        self.loss, self.parameters = loss, parameters
        self.told = False  # whether the loss itself tells
        self.fitting: dict[Kind, Measure] = {}

    def of(self, value: LossValue, batch: Batch, examples: int) -> float:
        """The divisor that the loss itself tells: a tuple's, or the number of losses.

        Raises LossError where there is not one loss for each example.
        """
        if isinstance(value, tuple):
            return float(value[1])
        if tuple(value.shape) != (examples,):
            raise LossError(
                f"the loss has shape {tuple(value.shape)}, but the batch has {examples} examples: "
                "return a loss for each of them, or the loss and what it was divided by"
            )
        return float(examples)

    def measured(self, model: nn.Module, batch: Batch) -> float | None:
        """The divisor of a scalar, measured in evaluation mode; None where the loss itself tells.

        Raises LossError where no known divisor fits, or more than one.
        """
        measure = self.measure(model, batch)
        return None if measure is None else measure(batch)  # 0 where there is no label at all

    def measure(self, model: nn.Module, batch: Batch) -> Measure | None:
        """What measures a batch of this kind, and each part of one, as ``measured`` does."""
        if (kind := self.unknown(batch)) is not None:
            self.fitting[kind] = self._measure(model, batch)
        return None if self.told else self.fitting[_kind(batch)]

    def unknown(self, batch: Batch) -> Kind | None:
        """The kind of this batch, where its divisor must be measured."""
        kind = _kind(batch)
        return None if self.told or kind in self.fitting else kind

    def _measure(self, model: nn.Module, batch: Batch) -> Measure:
        pairs = _pairs(batch)
        with quiet(model), _required(self.parameters):
            grads = [self._gradient(model, pair) for pair in pairs]
        if self.told:
            return DIVISORS[-1]
        coarse = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters)
        tolerance = 5e-2 if coarse else 1e-3
        fitting: dict[Measure, list[float]] = {}
        for divisor in DIVISORS:
            values = [value for pair in pairs if (value := divisor(pair)) is not None]
            # One in proportion to an earlier one differs from it in the unit alone.
            if (
                len(values) == len(pairs)
                and _adds_up(values, grads, tolerance)
                and not any(_in_proportion(values, earlier) for earlier in fitting.values())
            ):
                fitting[divisor] = values
        if len(fitting) != 1:
            raise LossError(
                "what this loss is a mean of cannot be told: let it return the losses of the "
                "examples (B,), or the loss and what the sum over the examples was divided by"
            )
        return next(iter(fitting))

    def _gradient(self, model: nn.Module, batch: Batch) -> Tensor:
        value = self.loss(model, batch)
        self.told = isinstance(value, tuple) or value.ndim > 0
        grads = torch.autograd.grad(scalar(value), list(self.parameters), allow_unused=True)
        return torch.cat([g.flatten().double() for g in grads if g is not None])


@contextmanager
def _required(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients of these, for a while."""
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


def _adds_up(values: Sequence[float], grads: Sequence[Tensor], tolerance: float) -> bool:
    """Whether the gradients of the rows ab, aa, bb and a, times their divisors, add up.

    Where x is ignored by the loss: those of ax too.
    """
    both, first, second, single, *ignored = (
        value * grad if value else torch.zeros_like(grad)
        for value, grad in zip(values, grads, strict=True)
    )
    limit = tolerance * (first.norm() + second.norm())
    rests = [2 * both - first - second, first - 2 * single, *(2 * x - first for x in ignored)]
    return all(bool(rest.norm() <= limit) for rest in rests)


def _in_proportion(values: Sequence[float], others: Sequence[float]) -> bool:
    return all(v * others[0] == o * values[0] for v, o in zip(values, others, strict=True))


def has_ignored(batch: Batch) -> bool:
    """Whether whole rows are left out of the loss."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return False
    return bool(labels.eq(IGNORED_LABEL).any())


def _kind(batch: Batch) -> Kind:
    return has_ignored(batch), "num_items_in_batch" in batch


def _pairs(batch: Batch) -> list[Batch]:
    """Rows ab, aa, bb and a of a batch, with labels that tell the divisors apart.

    Where the loss ignores a row x of the batch: ax too.
    """
    rows, labels = rows_of(batch), batch.get("labels")
    places = {"a": 0, "b": rows - 1}
    given: dict[str, Tensor] = {}
    if isinstance(labels, Tensor):
        if not labels.is_floating_point():
            counted = labels.reshape(rows, -1).ne(IGNORED_LABEL)
            unlike = (labels != labels[int(counted.sum(1).argmax())]).reshape(rows, -1).any(1)
            places["a"] = int(counted.sum(1).argmax())
            fitting = unlike & counted.any(1)
            other = places["a"] if labels.ndim == 1 else (places["a"] + 1) % rows
            places["b"] = int(fitting.long().argmax()) if bool(fitting.any()) else other
        given["a"], given["b"] = _told_apart(labels[places["a"]], labels[places["b"]])
        if has_ignored(batch):
            places["x"] = int(labels.eq(IGNORED_LABEL).long().argmax())
            given["x"] = labels[places["x"]]
    found: list[Batch] = []
    for pair in ("ab", "aa", "bb", "a", *(["ax"] if "x" in places else [])):
        index = [places[row] for row in pair]
        own = {
            k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
            for k, v in batch.items()
            if not k.startswith(("cu_seq", "max_length"))
        }
        if given:
            own["labels"] = torch.stack([given[row] for row in pair])
        if own.get("num_items_in_batch") is not None:
            own["num_items_in_batch"] = own["num_items_in_batch"] * (2 * len(pair) - 1)
        found.append(own)
    return found


def _told_apart(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of two rows that tell the divisors apart.

    Classes are unlike. Of tokens the rows keep unlike numbers of labels, and only the first row has
    one at its first token.
    """
    first, second = first.clone(), second.clone()
    if first.is_floating_point() or first.ndim > 1:
        return first, second
    if first.ndim == 0:
        return first, torch.full_like(second, int(first == 0)) if first == second else second
    labels = first[first.ne(IGNORED_LABEL)]
    if len(first) < 2 or not len(labels):
        return first, second
    first = _thinned(first, 2, LABELS_KEPT, labels[0])
    kept = max(1, int(first.ne(IGNORED_LABEL).sum()) // 2)
    second = _thinned(second, 1, kept, labels[0])
    first[0] = labels[0]
    return first, second


def _thinned(row: Tensor, least: int, most: int, label: Tensor) -> Tensor:
    """Labels ``(T,)`` with ``least`` to ``most`` that count, none of them the first."""
    counted = row[1:].ne(IGNORED_LABEL).nonzero().flatten() + 1
    row[counted[most:]] = IGNORED_LABEL
    row[0] = IGNORED_LABEL
    if len(counted) < least:  # beside one that is there: it may have padding around
        near = int(counted[0]) if len(counted) else 1
        places = [p for p in (near, near - 1, near + 1) if 0 < p < len(row)]
        row[places[:least]] = label
    return row
