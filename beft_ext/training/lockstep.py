"""One sharded model on several ranks: a forward or a backward of one rank takes all of them.

Ranks have batches of their own, unequal in number and kind. So what one must find out of the model
by running it, all find out, on that one's batch. Who has no batch runs along on another, for
nothing. And each forward and backward begins with a word from each rank: where one fails, or does
something else, all raise that, and nobody waits within torch's own exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from beft_ext.models.offload import device_of
from beft_ext.models.wrappers import inside, recover, sharded
from beft_ext.parallel import BACKWARD, FORWARD, Ranks
from beft_ext.training.counted import try_on, untried
from beft_ext.training.loss import Batch, on_device


@contextmanager
def in_step(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """While ranks run ``model`` together. Without effect on one that is not sharded."""
    if not sharded(model):
        yield
        return
    own = inside(model)
    handle = own.register_forward_pre_hook(lambda *_: ranks.begin(FORWARD), prepend=True)
    try:
        yield
    except BaseException:
        recover(own)
        raise
    finally:
        handle.remove()


class Lockstep:
    """What a rank of a sharded model does beside its own batches.

    Args:
        finding: by name, what finds something out of the model by running it on a batch.
    Attributes:
        needed: whether there are others that depend on it.
        spare: a batch that some rank had, for a rank that has none.
    """

    def __init__(
        self, model: nn.Module, ranks: Ranks, **finding: Callable[[Batch], object]
    ) -> None:
        self.model, self.ranks = model, ranks
        self.needed = ranks.size > 1 and sharded(model)
        self.spare: Batch = {}
        self.finding: dict[str, Callable[[Batch], object]] = {
            "output": partial(try_on, model),
            **finding,
        }

    def settle(self, batch: Batch, **unknown: Hashable) -> None:
        """Before a step: find out what any rank must, by the batch of the first that must.

        Args:
            batch: this rank's next; empty where it has none.
            unknown: by name, the kind of this batch, where something is to be found out of such
                batches; else None.
        """
        if not self.needed:
            return
        unknown = {"output": untried(self.model) or None, **unknown}
        wants = [(what, kind) for what, kind in unknown.items() if kind is not None]
        mine = None
        if batch and (wants or not self.spare):
            mine = wants, on_device(batch, torch.device("cpu"))
        settled = set()
        for told in self.ranks.gather(mine):
            wanted, theirs = told or ((), {})
            self.spare = self.spare or theirs
            for want in wanted:
                if want not in settled:
                    settled.add(want)
                    self.finding[want[0]](self._here(theirs))

    def _here(self, batch: Batch) -> Batch:
        return on_device(batch, device_of(self.model))

    def begin_backward(self) -> None:
        """Before the backward of a step."""
        if self.needed:
            self.ranks.begin(BACKWARD)

    def along(self, run: Callable[[Batch], Tensor], trained: Iterable[Tensor]) -> None:
        """The forward and backward of a step without rows; ``trained`` get no gradient of it."""
        if not self.needed:
            return
        value = run(self._here(self.spare))
        if value.requires_grad:
            self.begin_backward()
            value.backward()
        for parameter in trained:
            parameter.grad = None
