"""What judges an epoch of ``tune``: a metric of one's own, the loss on a loader, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beft_ext.models.modes import quiet
from beft_ext.models.offload import device_of
from beft_ext.parallel import here
from beft_ext.training.joined import side_by_side
from beft_ext.training.lockstep import Lockstep
from beft_ext.training.loss import Batch, Loss, LossValue, on_device, rows_of, scalar
from beft_ext.training.recipe import TuningError

LOADER_METRIC = "validation_loss"
# A metric of the model, batches with labels, or None.
Evaluation = Callable[[nn.Module], float] | Iterable[Mapping[str, Tensor]] | None


@dataclass(frozen=True)
class Judge:
    """Says what a model reaches, and whether that is the best so far.

    Attributes:
        metric: name of the number in the log; None where nothing is measured.
        measure: takes the model and gives the number.
        sign: 1 for the larger the better, -1 for the smaller.
    """

    metric: str | None = None
    measure: Callable[[nn.Module], float] | None = None
    sign: int = 1

    @classmethod
    def of(cls, evaluate: Evaluation, metric: str, loss: Loss) -> Judge:
        """What ``tune`` was given."""
        if evaluate is None:
            return cls()
        if callable(evaluate):
            return cls(metric, evaluate)
        batches = evaluate
        return cls(LOADER_METRIC, lambda model: mean_loss(model, batches, loss), -1)

    def record(self, model: nn.Module) -> dict[str, float]:
        """The number by its name."""
        if self.metric is None or self.measure is None:
            return {}
        return {self.metric: self.measure(model)}

    def best(self, new: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> bool:
        """Whether no earlier epoch is as good. Where nothing is measured, the latest is best."""
        key = self.metric
        return key is None or all(self.sign * new[key] > self.sign * h[key] for h in history)


def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], loss: Loss) -> float:
    """Mean over all ranks' batches, in evaluation mode; a batch counts by the divisor that its loss
    tells, one that tells none by its rows. Raises TuningError where there is no batch."""
    device = device_of(model)
    total = count = 0.0
    lockstep = Lockstep(model, here())
    if lockstep.needed:  # ranks may have unequal numbers of batches
        batches = side_by_side(here(), batches)

    def value_of(batch: Batch) -> LossValue:
        return loss(model, on_device(batch, device))

    with quiet(model), torch.no_grad():
        for batch in batches:
            lockstep.settle(batch)
            if not batch:
                lockstep.along(lambda given: scalar(loss(model, given)), ())
                continue
            value = value_of(batch)
            if isinstance(value, tuple):
                value, divisor = value[0], float(value[1])
            else:
                divisor = float(rows_of(batch))
            total += float(value.mean()) * divisor
            count += divisor
    total, count = (sum(own) for own in zip(*here().gather((total, count)), strict=True))
    if not count:
        raise TuningError("evaluate gave no batch: give batches that can be read at each epoch")
    return total / count
