"""``tune``: train what ``prepare`` chose, keep the best, and go on after a kill at any moment."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beft_ext.errors import BeftError
from beft_ext.files import save_tensors, sweep, whole_file
from beft_ext.training.loss import Loss, model_loss
from beft_ext.training.optim import BiasAdamW, rate_factor
from beft_ext.training.steps import EagerStep, GraphedStep

CHECKPOINT = "checkpoint.safetensors"


class TuningError(BeftError, RuntimeError):
    """A run that cannot start, go on or be resumed."""


@dataclass(frozen=True)
class Recipe:
    """What a run depends on beside model and data. warmup: share of the steps with rising rate,
    which then falls linearly to zero, or without ``decay`` stays. clip: global gradient norm, 0
    for none. bf16: autocast of the forward; biases, gradients and state stay fp32. compile: the
    forward by torch.compile, dropout as in eager mode. graphs: whole steps as CUDA graphs, see
    ``beft_ext.training.steps``."""

    epochs: int = 10
    lr: float = 1e-3
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    graphs: bool = False
    decay: bool = True


@dataclass
class Progress:
    """Where a run stands: ``history`` holds one record an evaluation."""

    step: int = 0
    loss_sum: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict, repr=False)


def tune(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    evaluate: Callable[[nn.Module], float],
    folder: str | Path,
    recipe: Recipe | None = None,
    *,
    loss: Loss = model_loss,
    metric: str = "accuracy",
    resume: bool = False,
    save_every: int = 50,
    progress: bool = False,
) -> Progress:
    """Train everything that requires grad, evaluate after each epoch, keep the best.

    model: prepared; its output has ``loss``. loader: has a length, and ``set_epoch`` or the same
        order each time. evaluate: the metric, the larger the better. loss: of the model and a
        batch, in place of the output's own.
    folder: gets ``log.jsonl`` (a line an evaluation), ``learning_curve.png`` and the checkpoint,
        written every ``save_every`` steps. resume: go on from it; the result is the same to the
        bit as that of a run that was not stopped.
    The model ends with the parameters of the best epoch. Raises TuningError for a loss or
    gradient that is not finite, nothing to train, or a checkpoint of another run; StepError
    where graphs are asked for and cannot be had.
    """
    recipe, folder = recipe or Recipe(), Path(folder)
    if save_every < 1:
        raise TuningError(f"save_every must be at least 1 step, but is {save_every}")
    run = _Run(model, loader, recipe, loss, metric)
    sweep(folder)
    if resume and (folder / CHECKPOINT).is_file():
        run.load(folder / CHECKPOINT)
    else:
        torch.manual_seed(recipe.seed)
    run.train(evaluate, folder, save_every, progress)
    with torch.no_grad():
        for name, p in run.parameters.items():
            p.copy_(run.state.best[name])
    run.write_history(folder)
    return run.state


class _Run:
    def __init__(
        self, model: nn.Module, loader: Iterable[Any], recipe: Recipe, loss: Loss, metric: str
    ) -> None:
        self.model, self.loader, self.recipe, self.metric = model, loader, recipe, metric
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise TuningError("no parameter requires grad: call prepare first")
        self.per_epoch = len(loader)  # type: ignore[arg-type]
        self.steps = recipe.epochs * self.per_epoch
        if self.steps < 1:
            raise TuningError("nothing to train on: the loader is empty or epochs is 0")
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = BiasAdamW(
            model, lr=recipe.lr, weight_decay=recipe.weight_decay, max_grad_norm=recipe.clip
        )
        self.state = Progress()
        self.step = self._make_step(loss)

    def _make_step(self, loss: Loss) -> EagerStep:
        recipe, model = self.recipe, self.model
        if recipe.graphs and recipe.compile:
            raise TuningError("compile and graphs do not go together: choose one")
        if recipe.graphs:
            pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
            return GraphedStep(model, self.optimizer, loss, recipe.bf16, pad)
        if recipe.compile:
            options: dict[str, Any] = {"fallback_random": True}
            model = torch.compile(model, dynamic=True, options=options)
        return EagerStep(model, self.optimizer, loss, recipe.bf16)

    def train(
        self,
        evaluate: Callable[[nn.Module], float],
        folder: Path,
        save_every: int,
        progress: bool,
    ) -> None:
        from tqdm import tqdm

        state = self.state
        with tqdm(total=self.steps, initial=state.step, disable=not progress, desc="tune") as bar:
            while len(state.history) < self.recipe.epochs:
                epoch, done = divmod(state.step, self.per_epoch)
                if epoch == len(state.history):  # not between an epoch's last step and its end
                    self._epoch(epoch, done, folder, save_every, bar)
                self._end_epoch(evaluate, folder)
                self.save(folder / CHECKPOINT)

    def _epoch(self, epoch: int, done: int, folder: Path, save_every: int, bar: Any) -> None:
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
        self.model.train()
        for batch in itertools.islice(self.loader, done, None):
            self._step(batch)
            bar.update()
            bar.set_postfix(
                loss=f"{self.state.loss_sum / (self.state.step - epoch * self.per_epoch):.3f}"
            )
            if self.state.step % save_every == 0:
                self.save(folder / CHECKPOINT)

    def _step(self, batch: Mapping[str, Tensor]) -> None:
        rate = self.recipe.lr * rate_factor(
            self.state.step, self.steps, self.recipe.warmup, self.recipe.decay
        )
        inputs = {k: v.to(self.device) for k, v in batch.items()}
        loss, norm = self.step(inputs, rate)
        number = float(loss)
        self.state.step += 1
        for what, value in (("loss", number), ("gradient", float(norm))):
            if not math.isfinite(value):
                raise TuningError(
                    f"the {what} is not finite at step {self.state.step}: lower the learning "
                    "rate or check the data; the last checkpoint is whole"
                )
        self.state.loss_sum += number

    def _end_epoch(self, evaluate: Callable[[nn.Module], float], folder: Path) -> None:
        state = self.state
        best = max((h[self.metric] for h in state.history), default=-math.inf)
        reached = evaluate(self.model)
        if reached > best or not state.best:
            state.best = {n: p.detach().clone() for n, p in self.parameters.items()}
        record = {"epoch": len(state.history) + 1, "step": state.step}
        state.history.append(
            {**record, "loss": state.loss_sum / self.per_epoch, self.metric: reached}
        )
        state.loss_sum = 0.0
        self.write_history(folder)

    def write_history(self, folder: Path) -> None:
        with whole_file(folder / "log.jsonl") as temporary:
            lines = (json.dumps(record) + "\n" for record in self.state.history)
            temporary.write_text("".join(lines), encoding="utf-8")

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        shapes = {n: list(p.shape) for n, p in self.parameters.items()}
        recipe = dataclasses.asdict(self.recipe)
        return {**recipe, "steps an epoch": self.per_epoch, "metric": self.metric, "shapes": shapes}

    def save(self, path: Path) -> None:
        state = self.state
        tensors = {f"param/{n}": p for n, p in self.parameters.items()}
        tensors |= {f"best/{n}": p for n, p in state.best.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer/{key}/{name}"] = value
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        record = {"step": state.step, "loss_sum": state.loss_sum, "history": state.history}
        metadata = {"run": json.dumps(self._identity()), "progress": json.dumps(record)}
        save_tensors(path, tensors, metadata)

    def load(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            identity, record = (json.loads(metadata[k]) for k in ("run", "progress"))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise TuningError(f"{path} is no checkpoint of tune ({error}): start anew") from error
        here = self._identity()
        for key, value in here.items():
            if identity.get(key) != value:
                raise TuningError(
                    f"{path} belongs to another run: its {key} is {identity.get(key)}, here it "
                    f"is {value}; start anew or give the same settings"
                )
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"param/{name}"])
                for key, value in self.optimizer.state[p].items():
                    value.copy_(tensors[f"optimizer/{key}/{name}"])
        best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
        self.state = Progress(
            record["step"],
            record["loss_sum"],
            record["history"],
            {n: v.to(self.device) for n, v in best.items()},
        )
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)
