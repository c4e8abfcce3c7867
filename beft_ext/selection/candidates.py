"""What competes in a selection: biases that are there, those that could be, those that are dead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from beft_ext.models import (
    Bias,
    BiasError,
    BiasMap,
    add_bias,
    find_biases,
    find_projections,
    pick,
    require_fit,
)
from beft_ext.models.offload import device_of
from beft_ext.selection.dead import QKV, dead_terms
from beft_ext.selection.result import SelectionError
from beft_ext.training.loss import Batch, first_rows, on_device


def candidates_of(
    model: nn.Module, terms: str | Iterable[str] | None, biases: BiasMap | None, every: bool
) -> tuple[dict[Bias, str], list[Bias]]:
    """Each bias that competes with the name it counts for; and those that the model lacks.

    terms, biases: as of ``select``. every: without ``terms``, whether all that could be added
    compete, or only queries, keys and values where the model has none of these.
    """
    have, lack = list(biases or ()), []
    require_fit(model, have, SelectionError)
    if biases is None:
        projections = find_projections(model)
        have = list(find_biases(model)) if any(p.has_bias for p in projections) else []
        lack = [p.bias for p in projections if p.linear and not p.has_bias]
    if terms is not None:
        try:
            names = pick([*have, *lack], terms)
        except BiasError as error:
            raise SelectionError(str(error)) from error
    else:
        if not every:
            attention = [b for b in lack if b.term.removeprefix("cross_") in QKV]
            lack = [] if any(b.term in QKV for b in have) else attention
        names = {b: b.term for b in (*have, *lack)}
    return {b: names[b] for b in BiasMap(names)}, [b for b in lack if b in names]


@contextmanager
def added(model: nn.Module, biases: Sequence[Bias]) -> Iterator[None]:
    """Biases of zeros where the model has none, for a while."""
    paths = dict.fromkeys(b.module for b in biases)
    try:
        for path in paths:
            add_bias(model, path)
        yield
    finally:
        for path in paths:
            model.get_submodule(path).bias = None


def dead_of(
    model: nn.Module,
    forward: Callable[[nn.Module, Batch], object],
    names: Mapping[Bias, str],
    batch: Batch,
) -> list[str]:
    """Names of dead terms, told by four examples. forward: of the model and a batch."""
    first_four = first_rows(on_device(batch, device_of(model)), 4)
    model.eval()
    dead = dead_terms(model, names, lambda: forward(model, first_four))
    return list(dict.fromkeys(name for b, name in names.items() if b.term in dead))
