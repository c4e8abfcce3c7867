"""The training run behind a selection, and what gives the model back as it was afterwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from beft_ext.models import Bias, head_parameters, offload
from beft_ext.models.offload import Values, device_of
from beft_ext.models.wrappers import class_of, is_shard, reshard, sharded
from beft_ext.parallel import Ranks, here
from beft_ext.progress import Count
from beft_ext.selection.result import SelectionError
from beft_ext.tap import Tap
from beft_ext.training.data import digest_of
from beft_ext.training.joined import NOTHING, Share, averaged, side_by_side
from beft_ext.training.lockstep import Lockstep
from beft_ext.training.loss import (
    Batch,
    Divisor,
    Loss,
    Measure,
    examples_of,
    items_given,
    model_loss,
    offsets_of,
    on_device,
    one,
    scalar,
)
from beft_ext.training.optim import BiasAdamW, rate_factor
from beft_ext.training.parts import in_parts, parts_of


def require_parts(model: nn.Module, parts: int) -> None:
    """Raise SelectionError where batches cannot be read in so many parts."""
    if parts < 1:
        raise SelectionError(f"a batch is read in 1 part or more, but parts is {parts}")
    if parts > 1 and sharded(model):
        raise SelectionError(
            "the ranks of a sharded model go step by step together, so their batches are not read "
            "in parts: lower the batch size"
        )


class BufferedLoader:
    """A loader whose ``first`` batch with rows is known before the first pass. without: a key of
    its batches that is left out.

    Raises SelectionError where there is none, or none that a model can be called with.
    """

    def __init__(self, loader: Iterable[Batch], without: str | None = None) -> None:
        self.loader, self.without = loader, without
        self.rest: Iterator[Batch] | None = iter(loader)
        self.begun: list[Batch] = []
        while not self.begun or not self.begun[-1]:
            batch = next(self.rest, None)
            if batch is None:
                raise SelectionError(
                    "the loader is empty, or was read before and can be read once: it needs a batch"
                )
            if not isinstance(batch, Mapping):
                raise SelectionError(
                    f"a batch must be a mapping of the model's arguments, but is a "
                    f"{type(batch).__name__}"
                )
            self.begun.append(batch)
        self.first = self._given(self.begun[-1])

    def __iter__(self) -> Iterator[Batch]:
        if self.rest is None:
            return map(self._given, self.loader)
        begun, self.rest = itertools.chain(self.begun, self.rest), None
        return map(self._given, begun)

    def _given(self, batch: Batch) -> Batch:
        if self.without is None:
            return batch
        return {k: v for k, v in batch.items() if k != self.without}


def require_same(ranks: Ranks, model: nn.Module, **facts: str) -> None:
    """Raise SelectionError where ranks have different models, or different ``facts``."""
    if ranks.size > 1:
        every = dict(model.named_parameters()) | dict(model.named_buffers())
        # Shards differ: they are parts of one model.
        own = Values(model, (n for n, t in every.items() if not is_shard(t)))
        digest = digest_of(own, class_of(model).__name__)
        ranks.agree(SelectionError, the_model=digest, **facts)


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class ModelSnapshot:
    """Gives the model back as it was, whatever happens in between."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        model, head = self.model, {id(p) for p in head_parameters(self.model)}
        vectors = [n for n, p in _named(model) if p.ndim == 1 or id(p) in head]
        self.taken = offload.take(model, vectors)
        self.required = {n: (p.requires_grad, p.grad) for n, p in _named(model)}
        self.modes = [(m, m.training) for m in model.modules()]
        trained = [p for p in model.parameters() if p.ndim == 1]
        trained += head_parameters(model)
        self.config: PreTrainedConfig = getattr(model, "config", object())
        self.cached = getattr(self.config, "use_cache", False)
        if self.cached:  # with a cache, transformers lets the texts of a packed batch mix
            self.config.use_cache = False
        self.values = [(t, t.detach().clone()) for t in (*trained, *model.buffers())]

    def __exit__(self, *_: object) -> None:
        reshard(self.model)
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
        for name, parameter in _named(self.model):
            required, parameter.grad = self.required[name]
            parameter.requires_grad_(required)
        offload.put_back(self.model, self.taken)
        for module, mode in self.modes:
            module.training = mode
        if self.cached:
            self.config.use_cache = True


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """By every name: an offloaded parameter is another object after each forward."""
    return model.named_parameters(remove_duplicate=False)


class Run:
    """The training run: AdamW over the tapped leaves and the task head."""

    def __init__(
        self,
        model: nn.Module,
        tap: Tap,
        *,
        loss: Loss = model_loss,
        steps: int,
        lr: float = 1e-3,
        warmup: float = 0.0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        parts: int = 1,
    ) -> None:
        self.parts = parts
        self.model, self.tap, self.steps, self.ranks = model, tap, steps, here()
        self.loss, self.max_grad_norm = loss, max_grad_norm
        self.pairs = tap.leaves()
        head = head_parameters(model)
        model.requires_grad_(False)
        for parameter in head:
            parameter.grad = None
            parameter.requires_grad_(True)
        named = [(bias.name, leaf) for bias, leaf in self.pairs]
        named += [(f"head.{i}", p) for i, p in enumerate(head)]
        self.optimizer = BiasAdamW(
            named, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: rate_factor(i, steps, warmup, decay=False)
        )
        self.initial = {b: leaf.detach().clone().flatten() for b, leaf in self.pairs}
        self.batch_sq = {b: 0.0 for b, _ in self.pairs}
        self.examples = self.done = 0
        vectors = [
            p
            for p in model.parameters()
            if p.ndim == 1 and p.is_floating_point() and not is_shard(p)
        ]
        self.divisor = Divisor(loss, list(dict.fromkeys([*head, *vectors])))
        measured = partial(self.divisor.measured, model)
        self.lockstep = Lockstep(model, self.ranks, divisor=measured, examples=self._locate)

    def train(self, loader: Iterable[Batch], progress: bool) -> list[float]:
        """The loss of each step."""
        losses: list[float] = []
        self.model.train()
        with Count("select", self.steps, progress and self.ranks.rank == 0) as count:
            while True:
                before = self.done
                for batch in side_by_side(self.ranks, loader):
                    losses.append(self._train_on(batch))
                    told = None
                    if count.shown and self.done % 10 == 0:
                        told = {"loss": f"{losses[-1]:.3f}", "leading": self._leading()}
                    count.add(said=told)
                    if self.done == self.steps:
                        return losses
                if self.done == before:
                    raise SelectionError("the loader ran dry: pass one that can be read again")

    def _train_on(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        number = averaged(self.ranks, self._trained(), self._backward(batch))
        self._stop_unless(math.isfinite(number), "loss")
        self.optimizer.step()
        norm = float(self.optimizer.grad_norm)
        self._stop_unless(math.isfinite(norm), "gradient")
        limit = self.max_grad_norm
        clipped = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        live = self.optimizer.scores()
        for bias, leaf in self.pairs:
            if leaf.grad is not None:
                grad_norm = live[bias.name].grad_norm * clipped
                self.batch_sq[bias] += grad_norm**2 / bias.width
        self.schedule.step()
        self.done += 1
        return number

    def _trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _backward(self, batch: Batch) -> Share:
        """Of this rank's batch, which may be empty: its gradients, and what they are a mean of."""
        inputs, share = on_device(batch, device_of(self.model)), NOTHING
        self.tap.rest()  # measuring a divisor takes backwards that are no example's
        unknown = self.divisor.unknown(inputs)
        self.lockstep.settle(inputs, divisor=unknown, examples=self._unlocated(inputs))
        if inputs:
            measure = self.divisor.measure(self.model, inputs)
            work = partial(self._backward_of, measure)
            parts = parts_of(inputs, self.parts)
            share = in_parts(parts, work, self._trained(), measure is items_given)
        if share is NOTHING:
            self.lockstep.along(lambda given: scalar(self.loss(self.model, given)), self._trained())
        return share

    def _backward_of(self, measure: Measure | None, inputs: Batch, unit: float | None) -> Share:
        """Of a part of the batch, as ``in_parts`` asks for it."""
        offsets, scale = offsets_of(inputs), None if measure is None else measure(inputs)
        size = examples_of(inputs, offsets)
        self.examples += size
        if scale == 0 and (self.ranks.size > 1 or self.parts > 1):  # no label: a mean over none
            return NOTHING
        if self.tap.unlocated(size, offsets) is not None:
            self._locate(inputs)
        self.tap.step(size, example_offsets=offsets)
        value = self.loss(self.model, inputs)
        if scale is None:
            scale = self.divisor.of(value, inputs, size)
        self.tap.divided_by(unit or scale or 1.0)
        loss = scalar(value)
        number = float(loss.detach())
        self._stop_unless(math.isfinite(number), "loss")
        self.lockstep.begin_backward()
        (loss if unit is None else loss * (scale / unit)).backward()
        return Share(number, scale, measure is one)

    def _unlocated(self, inputs: Batch) -> bool | None:
        offsets = offsets_of(inputs)
        return self.tap.unlocated(examples_of(inputs, offsets), offsets) if inputs else None

    def _locate(self, inputs: Batch) -> None:
        """Find where the examples lie, by the first batch of several."""
        offsets = offsets_of(inputs)
        size = examples_of(inputs, offsets)
        self.tap.locate(lambda given: self.loss(self.model, given), inputs, size, offsets)

    def counted(self) -> tuple[int, dict[Bias, tuple[Tensor, Tensor]]]:
        """The number of examples of all ranks, and the statistics of their gradients."""
        found = self.tap.statistics()
        self.ranks.sum([t for pair in found.values() for t in pair])
        return sum(self.ranks.gather(self.examples)), found

    def _stop_unless(self, fine: bool, what: str) -> None:
        if not fine:
            raise SelectionError(
                f"the {what} is not finite at step {self.done + 1}: nothing was kept; lower the "
                "learning rate or check the data"
            )

    def _leading(self) -> str:
        terms: dict[str, list[float]] = {}
        live = self.optimizer.scores()
        for bias, _ in self.pairs:
            if not math.isnan(live[bias.name].beft):
                terms.setdefault(bias.term, []).append(live[bias.name].beft)
        return max(terms, key=lambda t: sum(terms[t]) / len(terms[t]), default="none")

    def current(self) -> dict[Bias, Tensor]:
        """Each bias ``(H,)`` as it stands, in fp32 where the model is half precision."""
        state = self.optimizer.state
        return {
            b: state[leaf].get("master", leaf).detach().clone().flatten() for b, leaf in self.pairs
        }
