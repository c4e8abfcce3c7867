"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

IGNORED = -100  # torch's label of a token that the loss leaves out

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a transformers model gives out beside its logits when the batch has labels."""
    loss: Tensor = model(**batch).loss
    return loss


def examples_and_divisor(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many examples a batch holds, and the number that the mean in its loss divides by.

    ``labels (B,)``, floating-point ones, or none: a mean over the B examples; ``l_i`` is the
    loss that the model gives example i alone. Integer ``labels (B, T)``: a mean over the
    tokens whose label is not -100; ``l_i`` is the sum over the tokens of example i. A causal
    model predicts each token from those before it, so its first label does not count.
    Multiple choice, ``(B, C, T)`` with ``labels (B,)``, has B examples of C rows each.
    In every case ``loss = sum_i l_i / divisor``.
    """
    labels = batch.get("labels")
    if labels is None:
        count = len(next(iter(batch.values())))
        return count, count
    if labels.ndim < 2 or labels.is_floating_point():
        return len(labels), len(labels)
    counted = labels[:, 1:] if _is_causal(model) else labels
    return len(labels), int((counted != IGNORED).sum())


def _is_causal(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return type(model).__name__ in NAMES.values()
