"""What a training step minimises, and what it is a mean of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]

# Classes whose loss compares each token with its own label; not the next one's.
UNSHIFTED = ("ForMaskedLM", "ForTokenClassification", "ForPreTraining", "WithLMHeadModel")


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a transformers model gives out beside its logits when the batch has labels."""
    loss: Tensor = model(**batch).loss
    return loss


def examples_of(batch: Mapping[str, Tensor]) -> int:
    """B: rows of the labels or, without any, of the first tensor."""
    return len(batch["labels"] if "labels" in batch else next(iter(batch.values())))


def divisor(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """What the sum of the examples' losses was divided by to give the batch's loss.

    Labels ``(B,)``: B, and an example's loss is its own. Token labels ``(B, T)``: the tokens
    that count, those that are not -100, without the first of each row where a causal model
    predicts the next token; an example's loss is the sum over its tokens. Several targets an
    example ``(B, C)``, as floats: all B C of them. Source: DESIGN section 3.
    """
    labels = batch.get("labels")
    if labels is None or labels.ndim == 1:
        return examples_of(batch)
    if labels.is_floating_point():
        return labels.numel()
    both_ways = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    shifted = not both_ways and not type(model).__name__.endswith(UNSHIFTED)
    return int((labels[:, 1:] if shifted else labels).ne(-100).sum())
