"""Who takes part in an audition, and at which rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

from beft_ext.models import state
from beft_ext.selection.racers import AuditionError
from beft_ext.selection.run import ModelSnapshot
from beft_ext.training.preparation import prepare, restore

# Gives, for a while, a model whose parameters that require grad are to be trained; the same start
# each time. What it changes it undoes.
Contender = Callable[[], AbstractContextManager[nn.Module]]

RATE, LEAST, MOST = 1e-3, 1e-5, 1e-1
FIRST_LEAST, FIRST_MOST = 1e-4, 1e-2


def rates_around(center: float = RATE) -> tuple[float, ...]:
    """A third of it, it and three times it, within 1e-5 and 1e-1."""
    if not 0 < center < math.inf:
        raise AuditionError(f"a rate must be a positive number, but the center is {center}")
    return tuple(sorted({min(max(center * k, LEAST), MOST) for k in (1 / 3, 1, 3)}))


def rate_of_step(step: float) -> float:
    """A first guess of the rate at which biases train, from how far they would move.

    step: root mean square of the ridge regression's step for an element (``Gains.steps``). AdamW
    moves an element by the rate in each step, and a short training has some tens of steps that
    agree: a tenth, within 1e-4 and 1e-2.
    """
    return min(max(step / 10, FIRST_LEAST), FIRST_MOST)


def terms_of(model: nn.Module, terms: str | Sequence[str]) -> Contender:
    """The terms of a model as a contender: prepared in place; afterwards it is as it was."""

    @contextmanager
    def contender() -> Iterator[nn.Module]:
        with state.kept(model), ModelSnapshot(model):
            prepare(model, terms)
            try:
                yield model
            finally:
                restore(model)

    return contender


def made_by(make: Callable[[], nn.Module]) -> Contender:
    """As a contender: a model that is made anew each time, and ready to be trained."""
    return lambda: nullcontext(make())
