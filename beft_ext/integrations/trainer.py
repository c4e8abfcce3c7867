"""``transformers.Trainer``: the live scores of ``BiasAdamW`` in the Trainer's own logs."""

from __future__ import annotations

import math

from transformers import Trainer, TrainerCallback

from beft_ext.errors import BeftError
from beft_ext.training.optim import BiasAdamW


class IntegrationError(BeftError, RuntimeError):
    """A Trainer that was not set up as needed."""


class ScoreCallback(TrainerCallback):
    """Adds ``beft/<term>`` and ``magnitude/<term>``, means over layers, to each log record.

    Pass the optimizer to the Trainer (``optimizers=(BiasAdamW(model), None)``), then call
    ``log_scores(trainer)``: it puts this callback before those that report to TensorBoard and
    the like, which then see the scores too.
    """

    def on_log(self, args, state, control, logs=None, optimizer=None, **_):  # type: ignore[no-untyped-def]
        """Extend ``logs`` in place."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        if logs is not None and isinstance(optimizer, BiasAdamW):
            logs.update(term_scores(optimizer))


def term_scores(optimizer: BiasAdamW) -> dict[str, float]:
    """``beft/<term>`` and ``magnitude/<term>`` of the last step, means over layers; undefined
    scores are left out. Empty unless the optimizer was made from a prepared model."""
    found: dict[str, list[float]] = {}
    for name, score in optimizer.scores().items():
        layer, _, term = name.partition(".")
        if layer.isdigit() and term:
            found.setdefault(f"beft/{term}", []).append(score.beft)
            found.setdefault(f"magnitude/{term}", []).append(score.magnitude)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return {name: value for name, value in means.items() if not math.isnan(value)}


def log_scores(trainer: Trainer) -> None:
    """Let ``trainer`` log the scores. Raises IntegrationError where its optimizer is another."""
    if not isinstance(trainer.optimizer, BiasAdamW):
        raise IntegrationError(
            "the Trainer's optimizer is not a BiasAdamW: pass optimizers=(BiasAdamW(model), None)"
        )
    trainer.callback_handler.callbacks.insert(0, ScoreCallback())
