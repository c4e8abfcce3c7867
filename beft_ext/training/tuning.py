"""``tune``: train what ``prepare`` chose, keep the best, and go on after a kill at any moment."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from beft_ext import __version__, parallel
from beft_ext.errors import BeftWarning
from beft_ext.files import JsonObject, save_tensors, sweep, whole_file
from beft_ext.models import wrappers
from beft_ext.models.modes import cuda_devices, repeatable
from beft_ext.models.offload import device_of, is_offloaded
from beft_ext.progress import Count
from beft_ext.training.checkpoint import machine, model_digest, read_checkpoint
from beft_ext.training.data import Batch, Passes, digest_of, generators, length_of
from beft_ext.training.evaluation import Evaluation, Judge
from beft_ext.training.joined import require_apart, side_by_side
from beft_ext.training.lockstep import in_step
from beft_ext.training.loss import Loss, model_loss
from beft_ext.training.optim import BiasAdamW, rate_factor
from beft_ext.training.recipe import Progress, Recipe, TuningError
from beft_ext.training.steps import EagerStep, GraphedStep, JoinedStep

__all__ = ["CHECKPOINT", "Progress", "Recipe", "TuningError", "tune"]

CHECKPOINT = "checkpoint.safetensors"


def tune(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    evaluate: Evaluation = None,
    folder: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    loss: Loss = model_loss,
    metric: str = "accuracy",
    steps: int | None = None,
    resume: bool = False,
    save_every: int = 50,
    progress: bool = False,
    report: Callable[[Mapping[str, float]], None] | None = None,
) -> Progress:
    """Train everything that requires grad, evaluate after each epoch, and keep the best epoch.

    Files are written where a folder is given, and nowhere else. A resumed run ends in the same
    bits as one that was not stopped: it reads the batches of its unfinished epoch again, and
    compares them with those that the checkpoint counted. A checkpoint of another model, recipe or
    data is refused. Where torch, threads, backend, device or ranks are others, the run goes on,
    and a warning says that it is no longer the same to the bit.

    In a process group all ranks call it, each with rows of its own. A step is that of one process
    over the batches of all ranks; all end with the same parameters to the bit; rank 0 writes
    (docs/large-models.md).

    Args:
        model: a prepared model, or any other of which something requires grad; plain, under
            ``fully_shard``, or in DistributedDataParallel, of which the model inside trains.
        loader: batches, keyword arguments of the model. Each pass may draw a new order: with
            torch's global generator, with a torch.Generator of the loader, its sampler or its
            iterable data set, or with ``set_epoch``. An empty batch is a step without rows on this
            rank.
        evaluate: batches with labels, on which the loss judges, the smaller the better, those of
            all ranks together; or what takes the model and gives its metric, the larger the
            better, and may switch to evaluation mode: of several ranks the first one's number
            counts. None: nothing is judged, and the last epoch is kept.
        folder: gets ``log.jsonl``, a line for each epoch, and the checkpoint.
        recipe: the settings.
        loss: takes the model and a batch; by default it is the output's ``loss``. It gives a
            scalar, the losses of the examples ``(B,)``, or a scalar and its divisor.
        metric: the metric's name in the log; of batches it is ``validation_loss``.
        steps: training steps of an epoch, the same on all ranks; by default the loader's length,
            the longest of all ranks'. A loader without one needs it. A pass that has more batches
            is broken off there.
        resume: go on from the checkpoint in ``folder``; begin anew where that has none.
        save_every: training steps from checkpoint to checkpoint. Each epoch ends with one too.
        progress: show how far it is, on stderr: a bar, and lines in a log file.
        report: called with the record of each epoch as it ends; of several ranks, by the first.
    Returns:
        Where the run stands at its end. The model has the parameters of the best epoch, the
        first of those that are equal; it is in the mode that the last evaluation left.
    Raises:
        TuningError: nothing to train; a loader that is empty, or without a length where ``steps``
            is not given, or one that gives more or fewer batches; ``evaluate`` without a batch;
            ranks that differ in model, ``recipe`` or ``steps``; a loss or gradient that is not
            finite; ``save_every`` or ``steps`` below 1; ``resume`` without a folder; ``compile``
            beside ``graphs``, either of them on an offloaded model, ``graphs`` beside ``parts``,
            ``parts`` of a sharded model's batches; a checkpoint that is damaged or of another run.
        OptimizerError: a setting of the recipe is out of range, or what trains is sharded.
        LossError: the batches have no labels.
        RankError: a rank ended or fell silent.
        StepError: graphs are asked for and cannot be had (``beft_ext.training.steps``).
        OSError: the folder cannot be written to.
    Example:
        >>> import beft_ext
        >>> prepared = beft_ext.prepare(model, terms="value")
        >>> recipe = beft_ext.Recipe(epochs=2)
        >>> run = beft_ext.tune(model, loader, evaluate=loader[:1], recipe=recipe)
        >>> run.step, [record["epoch"] for record in run.history]
        (6, [1, 2])
        >>> list(run.history[0])
        ['epoch', 'step', 'loss', 'validation_loss']
    """
    recipe, folder = recipe or Recipe(), None if folder is None else Path(folder)
    if save_every < 1:
        raise TuningError(f"save_every must be at least 1 step, but is {save_every}")
    if steps is not None and steps < 1:
        raise TuningError(f"steps must be at least 1, but is {steps}")
    if resume and folder is None:
        raise TuningError("resume=True needs the folder of the run that is to go on")
    meeting = parallel.meeting("tune", wrappers.joint(model))
    with meeting as ranks, in_step(model, ranks), repeatable(recipe.deterministic):
        judge = Judge.of(evaluate, metric, loss)
        run = _TuningRun(model, Passes(loader, recipe.seed, steps), recipe, loss, judge, folder)
        if folder is not None and ranks.rank == 0:
            sweep(folder)
        left = None if folder is None or not resume else folder / CHECKPOINT
        if left is not None and ranks.first(left.is_file()):
            run.load(left)
        else:
            torch.manual_seed(ranks.seed(recipe.seed))
        if ranks.rank:
            progress, report = False, None
        run.train(save_every, progress, report)
        with torch.no_grad():
            for name, p in run.parameters.items():
                p.copy_(run.state.best[name])
        run.write_history()
    return run.state


class _TuningRun:
    def __init__(
        self,
        model: nn.Module,
        passes: Passes,
        recipe: Recipe,
        loss: Loss,
        judge: Judge,
        folder: Path | None,
    ) -> None:
        self.inside = wrappers.inside(model)
        # DDP would weigh all ranks alike, however few rows one has.
        self.model = self.inside if wrappers.replicated(model) else model
        self.recipe, self.judge, self.folder = recipe, judge, folder
        self.ranks = parallel.here()
        self.parameters = {n: p for n, p in self.inside.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise TuningError("no parameter requires grad: call prepare first")
        self.ranks.agree(TuningError, steps=repr(passes.most))
        length = passes.most or length_of(passes.loader)
        if length is None:
            raise TuningError(
                "tune needs a loader with a length, or steps=..., the training steps of an epoch"
            )
        self.per_epoch = max(self.ranks.gather(length))
        self.steps = recipe.epochs * self.per_epoch
        if self.steps < 1:
            raise TuningError("nothing to train on: the loader is empty or epochs is 0")
        self.device = device_of(self.inside)
        self.optimizer = BiasAdamW(
            model,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.max_grad_norm,
        )
        self.kept = set(self.inside.state_dict())  # on all ranks: a sharded model's is of all
        self.state = Progress()
        self.passes = passes
        self.rest: Iterator[Batch] | None = None  # of the epoch that a checkpoint stood in
        self.training_step = self._training_step(loss)
        if self.ranks.size > 1:
            told = {k: json.dumps(v, sort_keys=True) for k, v in self.identity.items()}
            start = digest_of({n: p.detach() for n, p in self.parameters.items()})
            self.ranks.agree(TuningError, **told, trained_parameters=start)

    def _training_step(self, loss: Loss) -> EagerStep:
        recipe, model = self.recipe, self.model
        if recipe.graphs and recipe.compile:
            raise TuningError("compile and graphs do not go together: choose one")
        if recipe.parts < 1:
            raise TuningError(f"a batch is read in 1 part or more, but parts is {recipe.parts}")
        if recipe.parts > 1 and wrappers.sharded(self.inside):
            raise TuningError(
                "the ranks of a sharded model go step by step together, so their batches are not "
                "read in parts: lower the batch size"
            )
        if recipe.graphs and recipe.parts > 1:
            raise TuningError("a graph is of a whole batch: leave out graphs, or parts")
        if (recipe.graphs or recipe.compile) and is_offloaded(self.inside):
            raise TuningError(
                "parts of this model are offloaded, which neither compile nor graphs can see "
                "through: leave them out"
            )
        if recipe.graphs and self.ranks.size > 1:
            raise TuningError("graphs are of one process: leave them out, or start one process")
        if recipe.graphs:
            pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
            return GraphedStep(model, self.optimizer, loss, recipe.bf16, pad)
        if recipe.compile:
            options = {"fallback_random": True}
            model = torch.compile(model, dynamic=True, options=options)
        if self.ranks.size > 1:
            return JoinedStep(model, self.optimizer, loss, recipe.bf16, self.ranks, recipe.parts)
        return EagerStep(model, self.optimizer, loss, recipe.bf16, recipe.parts)

    def train(
        self,
        save_every: int,
        progress: bool,
        report: Callable[[Mapping[str, float]], None] | None,
    ) -> None:
        state = self.state
        with Count("tune", self.steps, progress, state.step) as count:
            while len(state.history) < self.recipe.epochs:
                epoch = state.step // self.per_epoch
                if epoch == len(state.history):  # not between an epoch's last step and its end
                    self._epoch(epoch, save_every, count)
                self._end_epoch()
                if report is not None:
                    count.make_room()
                    report(state.history[-1])
                self.save()

    def _epoch(self, epoch: int, save_every: int, count: Count) -> None:
        batches, self.rest = self.rest or self.passes.epoch(epoch), None
        self.model.train()
        done = self.state.step - epoch * self.per_epoch
        for batch in side_by_side(self.ranks, batches):
            if self.state.step == 0:
                if not self.passes.digest:
                    raise TuningError("the loader is empty: it needs a batch on every rank")
                require_apart(self.ranks, batch, TuningError)
            done += 1
            if done > self.per_epoch:
                break
            self._train_on(batch)
            count.add(said={"loss": f"{self.state.loss_sum / done:.3f}"})
            if self.state.step % save_every == 0:
                self.save()
        if done != self.per_epoch:
            more = "more" if done > self.per_epoch else "fewer"
            said = "its length says" if self.passes.most is None else "steps= says"
            raise TuningError(
                f"the loader gave {more} batches in epoch {epoch + 1} than {said} "
                f"({self.per_epoch}): give the number that a pass has"
            )

    def _train_on(self, batch: Mapping[str, Tensor]) -> None:
        rate = self.recipe.lr * rate_factor(
            self.state.step, self.steps, self.recipe.warmup, self.recipe.decay
        )
        inputs = {k: v.to(self.device) for k, v in batch.items()}
        loss, norm = self.training_step(inputs, rate)
        number = float(loss)
        self.state.step += 1
        for what, value in (("loss", number), ("gradient", float(norm))):
            if not math.isfinite(value):
                raise TuningError(
                    f"the {what} is not finite at step {self.state.step}: lower the learning "
                    "rate or check the data; the last checkpoint is whole"
                )
        self.state.loss_sum += number

    def _end_epoch(self) -> None:
        state = self.state
        reached = self.ranks.first(self.judge.record(self.model))
        if self.judge.best(reached, state.history) or not state.best:
            state.best = {n: p.detach().clone() for n, p in self.parameters.items()}
        record = {"epoch": len(state.history) + 1, "step": state.step}
        state.history.append({**record, "loss": state.loss_sum / self.per_epoch, **reached})
        state.loss_sum = 0.0
        self.write_history()

    def write_history(self) -> None:
        if self.folder is None or self.ranks.rank > 0:
            return
        with whole_file(self.folder / "log.jsonl") as temporary:
            lines = (json.dumps(record) + "\n" for record in self.state.history)
            temporary.write_text("".join(lines), encoding="utf-8")

    @cached_property
    def identity(self) -> JsonObject:
        """What must be the same for a run to be resumed, beside the data."""
        shapes = {n: list(p.shape) for n, p in self.parameters.items()}
        recipe = dataclasses.asdict(self.recipe)
        del recipe["parts"]  # the steps are the same
        own = {"steps an epoch": self.per_epoch, "metric": self.judge.metric, "shapes": shapes}
        return {**recipe, **own, "model": model_digest(self.inside, self.parameters)}

    def _tensors(self) -> dict[str, Tensor]:
        """All that training changes, by its name in the checkpoint."""
        tensors = {f"param/{n}": p.detach() for n, p in self.parameters.items()}
        buffers = self.inside.named_buffers()
        tensors |= {f"buffer/{n}": b for n, b in buffers if n in self.kept}
        tensors = {n: t for n, t in tensors.items() if not t.is_meta}  # offloaded, as loaded
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer/{key}/{name}"] = value
        return tensors

    def save(self) -> None:
        """Rank 0 writes what all have in common, and each rank's random state and loader's."""
        if self.folder is None:
            return
        state = self.state
        own = {f"loader/{i}": g for i, g in enumerate(self.passes.generators)}
        own["random/cpu"] = torch.get_rng_state()
        for device in cuda_devices(self.inside):
            own[f"random/{device}"] = torch.cuda.get_rng_state(device)
        every = self.ranks.gather((own, self.passes.digest))
        if self.ranks.rank > 0:
            return
        tensors = self._tensors() | {f"best/{n}": p for n, p in state.best.items()}
        for rank, (theirs, _) in enumerate(every):
            tensors |= {f"{_of_rank(rank)}{name}": t for name, t in theirs.items()}
        record = {"step": state.step, "loss_sum": state.loss_sum, "history": state.history}
        record["parts"] = self.training_step.parts
        parts = {"run": self.identity, "machine": machine(self.device, self.ranks.size)}
        parts["progress"] = record | {"batches": "+".join(digest for _, digest in every)}
        metadata = {"version": __version__} | {k: json.dumps(v) for k, v in parts.items()}
        save_tensors(self.folder / CHECKPOINT, tensors, metadata)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; all is checked before the model changes."""
        tensors, identity, before, record = read_checkpoint(path)
        for key, value in self.identity.items():
            if identity.get(key) != value:
                what = "" if key == "model" else f" is {identity.get(key)}, here it is {value}"
                raise TuningError(
                    f"{path} belongs to another run: its {key}{what or ' is another one'}; start "
                    "anew or give the same model and settings"
                )
        mine = _of_rank(self.ranks.rank)
        own = {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)}
        states = [own[f"loader/{i}"] for i in range(sum(k[:7] == "loader/" for k in own))]
        self._enter_again(path, record, states)
        for key, value in machine(self.device, self.ranks.size).items():
            if before.get(key) != value:
                warnings.warn(
                    f"the run was begun with {key} {before.get(key)} and goes on with {value}: "
                    "its result is no longer the same to the bit",
                    BeftWarning,
                    stacklevel=3,
                )
        with torch.no_grad():
            for name, into in self._tensors().items():
                into.copy_(tensors[name])
        best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
        self.training_step.parts = max(self.recipe.parts, record.get("parts", 1))
        self.state = Progress(
            record["step"],
            record["loss_sum"],
            record["history"],
            {n: v.to(self.parameters[n].device) for n, v in best.items()},
        )
        if "random/cpu" not in own:  # there were fewer ranks
            torch.manual_seed(self.ranks.seed(self.recipe.seed + record["step"]))
            return
        torch.set_rng_state(own["random/cpu"])
        for device in cuda_devices(self.inside):
            if (kept := own.get(f"random/{device}")) is not None:
                torch.cuda.set_rng_state(kept, device)

    def _enter_again(self, path: Path, record: JsonObject, states: list[Tensor]) -> None:
        """Read again the batches that the checkpoint's epoch had given."""
        epoch, done = divmod(record["step"] - 1, self.per_epoch)
        own = generators(self.passes.loader)
        for generator, generator_state in zip(own, states, strict=False):
            generator.set_state(generator_state)
        batches = self.passes.epoch(epoch)
        for _ in range(done + 1):
            next(batches, None)
        digests = record["batches"].split("+")
        # Other ranks have other rows each: theirs cannot be compared.
        same = digests[self.ranks.rank : self.ranks.rank + 1] == [self.passes.digest]
        if len(digests) == self.ranks.size and (not same or len(own) != len(states)):
            raise TuningError(
                f"{path} belongs to a run on other data: the loader does not give the batches that "
                f"epoch {epoch + 1} had; start anew, or give the same data in the same order"
            )
        if done + 1 < self.per_epoch:
            self.rest = batches
        else:
            next(batches, None)  # the pass is over


def _of_rank(rank: int) -> str:
    """Before the names of what a checkpoint holds of one rank."""
    return f"rank {rank}/" if rank else ""
