"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a transformers model gives out beside its logits when the batch has labels."""
    loss: Tensor = model(**batch).loss
    return loss
