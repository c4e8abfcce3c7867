"""A batch, example by example: losses, probabilities, residuals.

What the losses of examples are is told by the model's own loss: of the readings that logits and
labels allow, the one whose mean it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, nll_loss

from beft_ext.training.counted import IGNORED_LABEL, counted_losses, losses_of, rounding
from beft_ext.training.loss import Batch, LossError, items_given, loss_of, offsets_of


@dataclass(frozen=True)
class Observed:
    """A batch, example by example, with autograd's graph where gradients are enabled.

    Attributes:
        losses: ``(B,)``, each the sum over the example's labels that count; in fp32 at least.
        counts: ``(B,)``, how many these are: 1 for a class, 0 for an example that is left out.
            ``losses.sum() / counts.sum()`` is the batch's loss.
        logs, right: log-probabilities ``(B, C)`` of classes or options, and ``(B,)`` the right
            ones.
        probabilities: ``(B, C)``.
        outputs, residuals: ``(B,)`` of a regression: predictions, and these less the targets.
    """

    losses: Tensor
    counts: Tensor
    logs: Tensor | None = None
    right: Tensor | None = None
    outputs: Tensor | None = None
    residuals: Tensor | None = None

    @property
    def probabilities(self) -> Tensor | None:
        """``(B, C)``; None where there are no classes."""
        return None if self.logs is None else self.logs.exp()

    @property
    def means(self) -> Tensor:
        """``(B,)``: each example's loss, a mean over its labels; 0 where none counts."""
        return self.losses / self.counts.clamp(min=1)

    @classmethod
    def of_classes(cls, scores: Tensor, right: Tensor) -> Observed:
        """Cross-entropy of ``(B, C)`` logits or scores against the right ones ``(B,)``."""
        logs = scores.log_softmax(-1, dtype=_wide(scores))
        losses = nll_loss(logs, right, reduction="none")
        return cls(losses, right.ne(IGNORED_LABEL).to(losses), logs, right)


def model_observe(model: nn.Module, batch: Batch) -> Observed:
    """What a transformers model says of each example of a batch with labels.

    Classes, numbers, several targets, tokens, each for its own place or for the next, and where an
    answer begins and ends, are told apart by the model's own loss. Packed texts are examples each.

    Raises: LossError where the model gives no loss, or one that is none of these, such as a
        weighted one.
    """
    counted = counted_losses(model, batch)
    if counted is not None:
        return Observed(*(_per_example(t, offsets_of(batch)) for t in counted))
    output: Any = model(**batch)
    labels: Any = batch.get("labels")
    logits: Any = getattr(output, "logits", None)
    loss = loss_of(output)
    readings: list[Observed] = []
    if isinstance(labels, Tensor) and isinstance(logits, Tensor):
        readings = _readings(logits, labels, offsets_of(batch))
    elif isinstance(logits := getattr(output, "start_logits", None), Tensor):
        readings = _spans(logits, output, batch)

    def off(reading: Observed) -> float:
        divisor = items_given(batch) or float(reading.counts.sum())
        # NaN where the loss is not finite: below, that counts as none.
        return float((reading.losses.sum() / divisor - loss).detach().abs())

    best = min(readings, key=off, default=None)
    if best is None or off(best) > rounding(loss.detach(), logits.detach()):
        raise LossError(
            "the losses of single examples cannot be told from this model's loss: let the loss "
            "return the losses of the examples (B,)"
        )
    return best


def _readings(logits: Tensor, labels: Tensor, offsets: Tensor | None) -> list[Observed]:
    """What the examples' losses may be, by the shapes and dtypes of logits and labels."""
    if labels.is_floating_point() and logits.numel() == labels.numel():
        outputs = logits.view_as(labels).to(_wide(logits))
        residuals = outputs - labels
        entropies = binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="none")
        squares, ones = residuals.square(), torch.ones_like(residuals)
        alone = {"outputs": outputs.flatten(), "residuals": residuals.flatten()}
        options = alone if labels.numel() == len(labels) else {}
        return [
            Observed(_per_example(squares, None), _per_example(ones, None), **options),
            Observed(_per_example(entropies, None), _per_example(ones, None)),
        ]
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
        return []
    if labels.ndim == 1:
        return [Observed.of_classes(logits, labels)]
    return [
        Observed(*(_per_example(t, offsets) for t in losses_of(logits, labels, ahead)))
        for ahead in (1, 0)
    ]


def _spans(starts: Tensor, output: Any, batch: Batch) -> list[Observed]:
    """Of answers in a text ``(B, T)``: two labels, where one begins and where it ends. A place
    outside of the text does not count."""
    found = []
    for logits, name in ((starts, "start_positions"), (output.end_logits, "end_positions")):
        places, outside = batch.get(name), starts.shape[-1]
        if not isinstance(places, Tensor) or places.numel() != len(starts):
            return []
        places = places.flatten().clamp(0, outside)
        logs = logits.log_softmax(-1, dtype=_wide(logits))
        losses = nll_loss(logs, places, reduction="none", ignore_index=outside)
        found.append(Observed(losses, places.ne(outside).to(losses)))
    first, last = found
    return [Observed(first.losses + last.losses, first.counts + last.counts)]


def _per_example(values: Tensor, offsets: Tensor | None) -> Tensor:
    """Sums over each row or, in packed rows, over each text."""
    if offsets is None:
        return values.reshape(len(values), -1).sum(1)
    texts = torch.arange(len(offsets) - 1, device=values.device)
    owner = texts.repeat_interleave(offsets.to(values.device).diff())
    return values.new_zeros(len(texts)).index_add(0, owner, values.flatten())


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
