"""A step of several ranks: the gradients of one process over all of their batches.

The loss of a batch is a sum over examples or labels, divided by a number. Of the batches of all
ranks the sum is divided by the sum of these numbers, so a rank with more rows counts for more.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from beft_ext import parallel
from beft_ext.errors import BeftError
from beft_ext.parallel import Ranks
from beft_ext.training.data import digest_of
from beft_ext.training.loss import Batch


class Share(NamedTuple):
    """What a rank brings to a step. loss: its batch's; divisor: by which the sum was divided;
    constant: whether that is one number, however many rows there are (the loss is a sum)."""

    loss: float
    divisor: float
    constant: bool = False


NOTHING = Share(0.0, 0.0)  # of a rank without a row that counts


def side_by_side(ranks: Ranks, batches: Iterable[Batch]) -> Iterator[Batch]:
    """This rank's batches, until no rank has one; an empty one where others have one more."""
    mine = iter(batches)
    while True:
        batch = next(mine, None)
        if not any(ranks.gather(batch is not None)):
            return
        yield {} if batch is None else batch


def require_apart(ranks: Ranks, first: Batch, error: type[BeftError]) -> None:
    """Raise ``error`` where two ranks begin with the same batch: it would be counted twice."""
    if ranks.size == 1:
        return
    digest = digest_of({k: v for k, v in first.items() if isinstance(v, Tensor)})
    seen: dict[str, int] = {}
    for rank, own in enumerate(ranks.gather(digest if first else f"nothing on rank {ranks.rank}")):
        if own in seen:
            raise error(
                f"ranks {seen[own]} and {rank} read the same batch: give each rank rows of its "
                "own, as with torch's DistributedSampler"
            )
        seen[own] = rank


def averaged(ranks: Ranks, parameters: Sequence[Tensor], share: Share) -> float:
    """Make each rank's gradients those of all ranks' batches; returns the loss of these."""
    if ranks.size == 1:
        return share.loss
    shares = ranks.gather((share, [p.grad is not None for p in parameters]))
    constant = any(own.constant for own, _ in shares)
    total = 1.0 if constant else sum(own.divisor for own, _ in shares)
    weight = share.divisor / total if total else float("nan")
    reached = [any(had) for had in zip(*(had for _, had in shares), strict=True)]
    trained = [p for p, had in zip(parameters, reached, strict=True) if had]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.mul_(weight)
    ranks.sum([p.grad for p in trained if p.grad is not None])
    losses = [own.loss * own.divisor for own, _ in shares]
    return sum(losses) / total if total else float("nan")


class Averaging:
    """In a loop of one's own over a sharded model: gradients of what is whole in each process.

    At the end of each backward they become the mean of all ranks', as ``fully_shard`` makes those
    of shards. Within a meeting it is the meeting that adds up. It ends with its holder.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self.task = -1  # the backward at whose end they are averaged
        heard = weakref.WeakMethod(self._heard)

        def hook(_parameter: Tensor) -> None:
            if (own := heard()) is not None:
                own()

        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(hook)

    def _heard(self) -> None:
        task = torch._C._current_graph_task_id()
        if task != self.task and not parallel.held():
            self.task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    def _average(self) -> None:
        with parallel.meeting("backward", promised=True) as ranks:
            averaged(ranks, self.parameters, Share(0.0, 1.0))
