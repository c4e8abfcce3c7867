"""``transformers.Trainer``: live scores in its logs, and the adapter beside its checkpoints."""

from __future__ import annotations

import math
import re
from pathlib import Path

from transformers import Trainer, TrainerCallback

from beft_ext.adapters import save_adapter
from beft_ext.errors import BeftError
from beft_ext.models import TERMS
from beft_ext.training.optim import BiasAdamW

BIAS_NAME = re.compile(r"[0-9]+\.([a-z_]+)(?:\.[0-9]+)?")


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


class AdapterCallback(TrainerCallback):
    """Saves the adapter into ``adapter/`` of each of the Trainer's checkpoints.

    A checkpoint holds added biases too, but ``from_pretrained`` drops them, for the model's class
    has none: ``load_adapter`` brings them back. Use: ``trainer.add_callback(AdapterCallback())``.
    """

    def on_save(self, args, state, control, model=None, **_):  # type: ignore[no-untyped-def]
        """Write the adapter of the prepared ``model``."""
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_adapter(model, checkpoint / "adapter")


def term_scores(optimizer: BiasAdamW) -> dict[str, float]:
    """``beft/<term>`` and ``magnitude/<term>`` of the last step, means over layers; undefined
    scores are left out. Empty unless the optimizer was made from a prepared model."""
    found: dict[str, list[float]] = {}
    for name, score in optimizer.scores().items():
        bias = BIAS_NAME.fullmatch(name)
        if bias is not None and bias[1] in TERMS:
            found.setdefault(f"beft/{bias[1]}", []).append(score.beft)
            found.setdefault(f"magnitude/{bias[1]}", []).append(score.magnitude)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return {name: value for name, value in means.items() if not math.isnan(value)}


def log_scores(trainer: Trainer) -> None:
    """Let ``trainer`` log the scores. Raises IntegrationError where its optimizer is another."""
    if not isinstance(trainer.optimizer, BiasAdamW):
        raise IntegrationError(
            "the Trainer's optimizer is not a BiasAdamW: pass optimizers=(BiasAdamW(model), None)"
        )
    trainer.callback_handler.callbacks.insert(0, ScoreCallback())
