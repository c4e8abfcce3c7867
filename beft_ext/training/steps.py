"""One training step: forward, backward and optimizer; run eagerly, or replayed as a CUDA graph.

A graph is captured for each shape of batch. Texts are padded up to a ``LENGTH_MULTIPLE``, so that
a data set has few shapes. The first batch of a shape runs eagerly: it is the warm-up that a
capture needs. The second is captured and replayed. So every batch trains exactly once, with the
random numbers that it would have without graphs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from beft_ext.errors import BeftError, BeftWarning
from beft_ext.ops import dispatch
from beft_ext.parallel import Ranks
from beft_ext.training.joined import NOTHING, Share, averaged
from beft_ext.training.lockstep import Lockstep
from beft_ext.training.loss import (
    Batch,
    Divisor,
    Loss,
    LossValue,
    Measure,
    examples_of,
    items_given,
    model_loss,
    offsets_of,
    one,
    scalar,
)
from beft_ext.training.optim import BiasAdamW
from beft_ext.training.parts import in_parts, parts_of, shortage_of

LENGTH_MULTIPLE = 32  # of tokens
MOST_GRAPHS = 16  # graphs kept: each holds the addresses of a whole step's kernels

# What an input is filled up with; labels only where there is one for each token.
PADDING_VALUES = {"attention_mask": 0, "token_type_ids": 0, "labels": -100}

T = TypeVar("T")
Shape = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]  # of a batch, input by input
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class StepError(BeftError, RuntimeError):
    """A step that cannot be captured."""


class EagerStep:
    """Makes a step; called with a batch on the model's device and a learning rate.

    A call gives the loss and the gradient's norm before clipping, as scalars on the device.

    Args:
        bf16: autocast of the forward.
        parts: that each batch is read in; twice as many from the step on that runs out of memory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: BiasAdamW,
        loss: Loss = model_loss,
        bf16: bool = False,
        parts: int = 1,
    ) -> None:
        self.model, self.optimizer, self.loss, self.bf16 = model, optimizer, loss, bf16
        self.parts, self.divisible = parts, True

    @cached_property
    def trained(self) -> list[Tensor]:
        """What the optimizer moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @cached_property
    def divisor(self) -> Divisor:
        """Of the loss; measured where a batch is one of several."""
        return Divisor(self.loss, self.trained)

    def __call__(self, batch: Mapping[str, Tensor], rate: float) -> tuple[Tensor, Tensor]:
        # In single precision, as a graph's kernels read it: with and without graphs the same.
        rate = float(torch.tensor(rate, dtype=torch.float32))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        return self.work(batch)

    def work(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Forward, backward and optimizer's step."""
        loss = self.fitted(batch, self._gradients)
        self.optimizer.step()
        return loss.detach(), self.optimizer.grad_norm

    def fitted(self, batch: Mapping[str, Tensor], work: Callable[[Mapping[str, Tensor]], T]) -> T:
        """``work`` of a batch, in as many parts as fit the memory. Raises what it raises where
        one row does not fit."""
        while True:
            try:
                return work(batch)
            except (RuntimeError, BeftError) as error:
                if not self.divisible or shortage_of(error) is None:
                    raise
                if len(parts_of(batch, 2 * self.parts)) <= self.parts:
                    raise
            self.parts *= 2
            self.optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"a batch does not fit the memory: from now on each is read in {self.parts} parts, "
                "and the steps are the same",
                BeftWarning,
                stacklevel=2,
            )

    def _gradients(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Those of the batch; returns its loss."""
        if self.parts > 1 and len(parts_of(batch, self.parts)) > 1:
            share = self._shares(batch)
            return torch.tensor(share.loss if share.divisor else math.nan, device="cpu")
        loss = scalar(self._forward(batch))
        self._backward(loss)
        return loss

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _forward(self, batch: Batch) -> LossValue:
        device = next(iter(batch.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.loss(self.model, batch)

    def _shares(self, batch: Mapping[str, Tensor]) -> Share:
        """The gradients of a batch in its parts, and what they are a mean of."""
        measure = self.divisor.measure(self.model, batch)
        parts = parts_of(batch, self.parts)
        return in_parts(parts, partial(self._share, measure), self.trained, measure is items_given)

    def _share(
        self, measure: Measure | None, batch: Mapping[str, Tensor], unit: float | None
    ) -> Share:
        scale = None if measure is None else measure(batch)
        if scale == 0:  # no label: the mean over none is not a number
            return NOTHING
        value = self._forward(batch)
        loss = scalar(value)
        if scale is None:
            scale = self.divisor.of(value, batch, examples_of(batch, offsets_of(batch)))
        self._backward(loss if unit is None else loss * (scale / unit))
        return Share(float(loss.detach()), scale, measure is one)


class JoinedStep(EagerStep):
    """The step of one process over the batches of all ranks; an empty batch adds nothing.

    Args:
        ranks: of the meeting that is held.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: BiasAdamW,
        loss: Loss,
        bf16: bool,
        ranks: Ranks,
        parts: int = 1,
    ) -> None:
        super().__init__(model, optimizer, loss, bf16, parts)
        self.ranks = ranks
        self.lockstep = Lockstep(model, ranks, divisor=partial(self.divisor.measured, model))
        self.divisible = not self.lockstep.needed  # the others would be left behind

    def work(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """This rank's forward and backward, and every rank's optimizer's step."""
        loss = averaged(self.ranks, self.trained, self._own(batch))
        self.optimizer.step()
        return torch.tensor(loss, device="cpu"), self.optimizer.grad_norm

    def _own(self, batch: Mapping[str, Tensor]) -> Share:
        """This rank's gradients; an empty batch has none."""
        self.lockstep.settle(batch, divisor=self.divisor.unknown(batch))
        share = self.fitted(batch, self._shares) if batch else NOTHING
        if share is NOTHING:
            self.lockstep.along(lambda given: scalar(self._forward(given)), self.trained)
        return share

    def _backward(self, loss: Tensor) -> None:
        self.lockstep.begin_backward()
        loss.backward()


class GraphedStep(EagerStep):
    """The same numbers, with the launches of a whole step replaced by one.

    Batches beyond ``MOST_GRAPHS`` shapes run eagerly.

    Args:
        bf16: autocast of the forward.
        pad: token that fills up ``input_ids``.
        capture: runs a function and gives what replays it; by default a CUDA graph.
    Raises:
        StepError: there is no CUDA device, neither the CUDA kernels nor Triton run on it, or the
            model's own code cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: BiasAdamW,
        loss: Loss = model_loss,
        bf16: bool = False,
        pad: int = 0,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(model, optimizer, loss, bf16)
        self.divisible = False  # a graph is of a whole batch
        self.device = next(model.parameters()).device
        self.fills = PADDING_VALUES | {"input_ids": pad}
        if capture is None:
            self._require_cuda()
        self.capture: Capture = capture or _CudaCapture()
        # Kernels read the rate from here: a number would be frozen into the graph.
        self.rate = torch.zeros((), device=self.device)
        self.seen: set[Shape] = set()
        self.graphs: dict[Shape, _Replay] = {}

    def __call__(self, batch: Mapping[str, Tensor], rate: float) -> tuple[Tensor, Tensor]:
        batch = self.padded(batch)
        shape = tuple((k, tuple(v.shape), v.dtype) for k, v in batch.items())
        self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        if shape not in self.graphs and (shape not in self.seen or len(self.graphs) == MOST_GRAPHS):
            self.seen.add(shape)
            self.optimizer.zero_grad()
            return self.warm_up(batch)
        if shape not in self.graphs:
            self.graphs[shape] = _Replay(self, batch)
        return self.graphs[shape](batch)

    def fitted(self, batch: Mapping[str, Tensor], work: Callable[[Mapping[str, Tensor]], T]) -> T:
        """A graph is of a whole batch."""
        return work(batch)

    @cached_property
    def side(self) -> torch.cuda.Stream:
        """One for all warm-ups: what is freed on a stream is given again on that stream alone."""
        return torch.cuda.Stream(self.device)

    def warm_up(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """An eager step, beside the stream that captures wait for."""
        if self.device.type != "cuda":
            return self.work(batch)
        side, main = self.side, torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            found = self.work(batch)
        main.wait_stream(side)
        return found

    def padded(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``batch`` with its texts filled up to a ``LENGTH_MULTIPLE``.

        A batch without an attention mask, or with other inputs as long as the texts, stays.
        """
        ids = batch.get("input_ids")
        if ids is None or "attention_mask" not in batch:
            return dict(batch)
        length = ids.shape[-1]
        texts = {k for k, v in batch.items() if v.ndim >= 2 and v.shape[-1] == length}
        more = -length % LENGTH_MULTIPLE
        if not texts <= set(self.fills) or not more:
            return dict(batch)
        pad = nn.functional.pad
        return {k: pad(v, (0, more), value=self.fills[k]) if k in texts else v
                for k, v in batch.items()}  # fmt: skip

    def _require_cuda(self) -> None:
        if self.device.type != "cuda":
            raise StepError("CUDA graphs need a model on a CUDA device")
        if dispatch.choose(self.device) == "reference":
            raise StepError(
                "CUDA graphs need the compiled CUDA kernels or Triton: see 'beft-ext doctor' for "
                "what is missing"
            )


class _Replay:
    """One captured step, its inputs and outputs at fixed addresses."""

    def __init__(self, step: GraphedStep, batch: Mapping[str, Tensor]) -> None:
        self.inputs = {k: v.clone() for k, v in batch.items()}
        self.outputs: tuple[Tensor, Tensor]
        step.optimizer.zero_grad()  # gradients are to be of the graph's own memory

        def work() -> None:
            self.outputs = step.work(self.inputs)

        try:
            self.replay = step.capture(work)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise StepError(
                f"this model's step cannot be captured ({reason}): run without graphs"
            ) from error

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        for name, tensor in self.inputs.items():
            tensor.copy_(batch[name])
        self.replay()
        # Graphs share their memory: what is read later must not lie in it.
        loss, norm = self.outputs
        return loss.clone(), norm.clone()


class _CudaCapture:
    """Captures into one pool of memory: graphs are replayed one after another."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a loader that pins memory, another model) may go on with what they do.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            work()
        return graph.replay
