"""What an audition found: the racers in order, as an object, a printed table and a record."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from torch import Tensor

from beft_ext import __version__
from beft_ext.errors import BeftError
from beft_ext.files import DIGEST, UNSEALED, digest, save_json


class AuditionError(BeftError, ValueError):
    """An audition that cannot be held, or a record of one that cannot be read."""


class NoRaceError(AuditionError):
    """Rows or a budget that allow no audition at all; nothing was trained."""


@dataclass(frozen=True)
class Rung:
    """One round. racers: at its start; steps: of training on each part of the rows; rows: that
    judged each racer, ``share`` of those held out."""

    racers: int
    steps: int
    rows: int
    share: float


@dataclass(frozen=True)
class Racer:
    """A contender at one rate, as it stood in the last rung that it ran in.

    Attributes:
        rung: number of that rung, from 1.
        loss: mean over the held-out rows; None where it diverged.
        behind: by how much its loss is above the winner's in the same rung; None likewise.
        error: standard error of ``behind``, paired over the rows.
        fate: what became of it.
    """

    contender: str
    lr: float
    rung: int
    loss: float | None
    behind: float | None
    error: float | None
    fate: str


@dataclass(frozen=True)
class Audition:
    """The racers, the winner first, and what the race cost.

    Attributes:
        rates: the grid of each contender.
        folds: parts of the rows that were held out in turn; 1 for one part alone.
        epochs: cost in passes over all rows, a row that judges counted as a third of one that
            trains.
    """

    racers: tuple[Racer, ...]
    rungs: tuple[Rung, ...]
    rates: dict[str, tuple[float, ...]]
    folds: int
    epochs: float
    seconds: float = field(compare=False)

    @property
    def best(self) -> str:
        """The contender that won."""
        return self.racers[0].contender

    @property
    def lr(self) -> float:
        """The rate at which it won."""
        return self.racers[0].lr

    @property
    def rate(self) -> float:
        """The rate to train at: the winner's, or the middle one of its grid, from which the race
        set out, where that is behind by less than the error."""
        grid = self.rates[self.best]
        middle = grid[len(grid) // 2]
        for racer in self.racers:
            if (racer.contender, racer.lr) == (self.best, middle) and racer.behind is not None:
                return middle if racer.behind <= (racer.error or 0.0) else self.lr
        return self.lr

    @property
    def sure(self) -> float:
        """Probability, at least, that no rival is better: one-sided normal, summed over rivals."""
        return _sure(self.racers[1:])

    @property
    def sure_of_contender(self) -> float:
        """The same of the other contenders alone, at any of their rates."""
        return _sure(r for r in self.racers if r.contender != self.best)

    @property
    def edge(self) -> str | None:
        """'smallest' or 'largest' where the winner's rate ends its grid: better ones may lie
        beyond."""
        grid = self.rates[self.best]
        ends = {grid[0]: "smallest", grid[-1]: "largest"}
        return ends.get(self.lr) if len(grid) > 1 else None

    def __str__(self) -> str:
        names = [r.contender for r in self.racers]
        wide = max(len("contender"), *map(len, names)) + 2
        heads = "".join(f"{h:>10}" for h in ("rate", "loss", "behind", "error", "rows"))
        lines = [f"{'':>4} {'contender':<{wide}}{heads}"]
        for place, racer in enumerate(self.racers, 1):
            numbers = (racer.loss, racer.behind, racer.error)
            cells = "".join(f"{'-' if n is None else f'{n:.4f}':>10}" for n in numbers)
            rows = self.rungs[racer.rung - 1].rows
            lines.append(
                f"{f'{place}.':>4} {racer.contender:<{wide}}{racer.lr:>10.2g}{cells}{rows:>10}  "
                f"{racer.fate}"
            )
        return "\n".join([*lines, "", self.summary])

    @property
    def summary(self) -> str:
        """One sentence: who won, how surely, at what cost."""
        noted = f" (the {self.edge} of its rates)" if self.edge else ""
        parts = f"{self.folds} parts in turn" if self.folds > 1 else "one part"
        return (
            f"'{self.best}' won at {self.lr:.2g}{noted}: no rival is better with probability "
            f"{self.sure:.2f} or more, so train at {self.rate:.2g}; judged on {parts} of the "
            f"training rows, in {self.epochs:.1f} epochs' time"
        )

    def record(self) -> dict[str, Any]:
        """For JSON; ``Audition.of`` reads it."""
        told = ("best", "lr", "rate", "sure", "sure_of_contender", "edge")
        return {name: getattr(self, name) for name in told} | asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, with a digest; ``read_audition`` reads it."""
        save_json(path, {"version": __version__, **self.record(), DIGEST: UNSEALED})

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Audition:
        """From a ``record``. Raises AuditionError."""
        try:
            return cls(
                racers=tuple(Racer(**r) for r in record["racers"]),
                rungs=tuple(Rung(**r) for r in record["rungs"]),
                rates={name: tuple(rates) for name, rates in record["rates"].items()},
                folds=record["folds"],
                epochs=record["epochs"],
                seconds=record["seconds"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise AuditionError(f"this is not an audition's record: {error}") from error


def read_audition(path: Path) -> Audition:
    """From a file of ``Audition.save``. Raises AuditionError where it is damaged, or another's."""
    try:
        if digest(path, AuditionError) is None:
            raise AuditionError("it carries no digest")
        return Audition.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise AuditionError(f"{path} cannot be read ({error}): hold the audition anew") from error


def paired(rival: Tensor, first: Tensor, trained: int) -> tuple[float, float]:
    """Mean and standard error of the differences of two racers' losses ``(N,)``.

    The racers share their training rows, so the rows' differences are not independent. ``trained``
    is the number of rows that a racer learnt from: ``SE^2 = var(d) (1 / N + 1 / trained)``.
    Source: Nadeau & Bengio 2003, where a part of n rows judges: var(d) / n (1 / J + n / trained).
    """
    differences = rival - first
    variance = float(differences.var()) * (1 / len(differences) + 1 / trained)
    return float(differences.mean()), math.sqrt(variance)


def _sure(rivals: Iterable[Racer]) -> float:
    return max(0.0, 1 - sum(map(_better, rivals)))


def _better(rival: Racer) -> float:
    """Probability that ``rival`` is better than the winner."""
    if rival.behind is None or rival.error is None:
        return 0.0
    if rival.error == 0:
        return 0.5 if rival.behind <= 0 else 0.0
    return NormalDist(0, rival.error).cdf(-rival.behind)
