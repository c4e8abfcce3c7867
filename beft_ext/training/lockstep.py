"""One sharded model on several ranks: a forward or a backward of one rank takes all of them.

Ranks have batches of their own, unequal in number and kind. So what one must find out of the model
by running it, all find out, on that one's batch. Who has no batch runs along on another, for
nothing. And each forward and backward begins with a word from each rank: where one fails, or does
something else, all raise that, and nobody waits within torch's own exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from beft_ext.models.wrappers import inside, recover, sharded
from beft_ext.parallel import BACKWARD, FORWARD, Ranks
from beft_ext.training.loss import Batch, on_device

Want = tuple[str, Hashable]  # what is to be found out, and of which kind of batches


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

    Attributes:
        needed: whether there are others that depend on it.
        spare: a batch that some rank had, for a rank that has none.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks, self.needed = ranks, ranks.size > 1 and sharded(model)
        self.spare: Batch = {}

    def settle(
        self,
        batch: Batch,
        wants: Sequence[Want] = (),
        find_out: Callable[[str, Batch], object] = lambda *_: None,
    ) -> None:
        """Before a step: find out what any rank must.

        Args:
            batch: this rank's next; empty where it has none.
            wants: what this rank must find out by it.
            find_out: takes the name of what is wanted, and the batch of the first rank that must.
        """
        if not self.needed:
            return
        mine = None
        if batch and (wants or not self.spare):
            mine = list(wants), on_device(batch, torch.device("cpu"))
        settled: set[Want] = set()
        for told in self.ranks.gather(mine):
            wanted, theirs = told or ((), {})
            self.spare = self.spare or theirs
            for want in wanted:
                if want not in settled:
                    settled.add(want)
                    find_out(want[0], theirs)

    def begin_backward(self) -> None:
        """Before the backward of a step."""
        if self.needed:
            self.ranks.begin(BACKWARD)

    def along(self, run: Callable[[Batch], Tensor], trained: Iterable[Tensor]) -> None:
        """The forward and backward of a step without rows; ``trained`` get no gradient of it."""
        if not self.needed:
            return
        value = run(self.spare)
        if value.requires_grad:
            self.begin_backward()
            value.backward()
        for parameter in trained:
            parameter.grad = None
