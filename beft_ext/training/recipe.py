"""What ``tune`` is asked for, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from beft_ext.errors import BeftError


class TuningError(BeftError, RuntimeError):
    """A run that cannot start, go on or be resumed."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a run of ``tune``.

    Attributes:
        epochs: passes over the loader.
        lr: largest learning rate.
        warmup: fraction of the steps over which the learning rate rises linearly, in [0, 1].
        weight_decay: as in AdamW; 0 by default, as biases are trained without.
        max_grad_norm: the gradient's global norm is clipped to this; 0 for no clipping.
        seed: of the run's random numbers, dropout and the loader's order.
        bf16: autocast of the forward; biases, gradients and the optimizer's state stay fp32.
        compile: run the forward under torch.compile, with the dropout of eager mode.
        graphs: run whole steps as CUDA graphs; not together with ``compile``.
        decay: after warm-up, let the rate fall linearly to zero; otherwise it stays constant.
        parts: that each batch is read in, one after another; their gradients add up to the batch's.
            The same steps in less memory, but for dropout's draws and rounding. A step that runs
            out of memory doubles it.
        deterministic: on a GPU, take torch's deterministic algorithms alone, so that the same run
            ends in the same bits there too; it costs time. A CPU needs nothing.
    Example:
        >>> import beft_ext
        >>> recipe = beft_ext.Recipe(epochs=3, lr=4e-4)
        >>> recipe.decay, recipe.max_grad_norm
        (True, 1.0)
    """

    epochs: int = 10
    lr: float = 1e-3
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    graphs: bool = False
    decay: bool = True
    deterministic: bool = False
    parts: int = 1


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: number of training steps made.
        loss_sum: sum of the losses of the present epoch's steps.
        history: a record for each epoch: ``epoch``, ``step``, ``loss`` (the mean over the epoch's
            steps) and the metric, where there is one.
        best: parameters of the best epoch, by name.
    """

    step: int = 0
    loss_sum: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict, repr=False)
