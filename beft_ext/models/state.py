"""What the package leaves on a model: one object, beside its parameters and out of ``state_dict``.

It holds one record of a kind (the tap, what was prepared, the loaded adapters, ...). It lies on
the model inside of any wrapper, and is gone when its last record is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from beft_ext.models.wrappers import inside

_NAME = "_beft_state"


class Record:
    """What one room keeps on a model."""

    def claim(self) -> str | None:
        """Why the model cannot be prepared while this lies on it, as a sentence; None if it can."""
        return None


R = TypeVar("R", bound=Record)


def get(model: nn.Module, kind: type[R]) -> R | None:
    """The record of this kind, or None."""
    found = _records(model).get(kind)
    return found if isinstance(found, kind) else None


def put(model: nn.Module, record: Record) -> None:
    """Leave ``record`` on the model, in place of one of its kind."""
    setattr(inside(model), _NAME, _records(model) | {type(record): record})


def take(model: nn.Module, kind: type[R]) -> R | None:
    """Take the record of this kind away and return it, or None."""
    found = get(model, kind)
    left = {k: r for k, r in _records(model).items() if k is not kind}
    _keep(model, left)
    return found


def claims(model: nn.Module) -> list[str]:
    """Why the model cannot be prepared: a sentence for each record that forbids it."""
    return [why for r in _records(model).values() if (why := r.claim()) is not None]


def clear(model: nn.Module) -> None:
    """Take every record away."""
    _keep(model, {})


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Whatever is put on the model or taken away in between, it has the same records again."""
    before = _records(model)
    try:
        yield
    finally:
        _keep(model, before)


def _records(model: nn.Module) -> dict[type[Record], Record]:
    records: dict[type[Record], Record] = inside(model).__dict__.get(_NAME, {})
    return records


def _keep(model: nn.Module, records: dict[type[Record], Record]) -> None:
    if records:
        setattr(inside(model), _NAME, records)
    else:
        inside(model).__dict__.pop(_NAME, None)
