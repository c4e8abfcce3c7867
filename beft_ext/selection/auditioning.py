"""``audition``: which contender to train, and at which rate, is measured by short trainings.

Racers are pairs of a contender and a rate. Each trains on a part of the rows and is judged by its
loss on the others. Up to ``FOLDED`` rows the two halves are held out in turn, so that every row
judges once; of more rows every fifth is held out. A rung trains and judges all racers that are
left, each from the same start, on the same batches and with the same dropout, and keeps the
better half; the next rung trains for twice as long and is judged by twice as many rows. The last
one is between ``FINALISTS`` at most, on all held-out rows. Every rung starts anew, so its
schedule of the rate is whole, and nothing of a racer is kept but its losses.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from beft_ext import parallel
from beft_ext.errors import BeftWarning
from beft_ext.models.offload import device_of
from beft_ext.models.wrappers import sharded
from beft_ext.progress import Count
from beft_ext.selection.contenders import Contender, rates_around
from beft_ext.selection.racers import Audition, AuditionError, NoRaceError, Racer, Rung, paired
from beft_ext.training.loss import Batch, Loss, model_loss, on_device, rows_of
from beft_ext.training.observed import model_observe
from beft_ext.training.optim import BiasAdamW, rate_factor
from beft_ext.training.steps import EagerStep
from beft_ext.training.tuning import Recipe

Losses = Callable[[nn.Module, Batch], Tensor]
Entry = tuple[str, float]
Split = tuple[list[int], list[int]]  # rows that train, and rows that judge
Tick = Callable[[], object]  # called after each step

FOLDED = 500
HALVES, FIFTHS = 2, 5
FINALISTS, FEWEST = 3, 4
JUDGING = 1 / 3  # the cost of a forward, beside that of forward and backward


class Part(Protocol):
    """Batches of some rows; each pass may draw a new order, the first one always the same.
    ``plan`` tells which rows the next pass has in each batch."""

    def plan(self) -> list[list[int]]: ...
    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...
    def __len__(self) -> int: ...


class Rows(Protocol):
    """Rows that can be parted: ``beft_ext.tasks.Batches``. A row has a ``label``, and may have a
    ``group``, whose rows stay together. size: rows of a batch, at most; digest: of all rows."""

    @property
    def rows(self) -> Sequence[Any]: ...
    @property
    def size(self) -> int: ...
    def digest(self) -> str: ...
    def part(self, indices: Sequence[int], seed: int | None = None) -> Part: ...


class _Diverged(Exception):
    """A racer whose loss or gradient is not finite."""


def losses_of(model: nn.Module, batch: Batch) -> Tensor:
    """``(B,)``: the losses of the examples, told by the model's own loss."""
    return model_observe(model, batch).means


def audition(
    contenders: Mapping[str, Contender],
    batches: Rows,
    rates: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    *,
    loss: Loss = model_loss,
    losses: Losses = losses_of,
    recipe: Recipe | None = None,
    budget: float = 3.0,
    seed: int = 0,
    progress: bool = False,
) -> Audition:
    """Race the contenders at their rates, on a part of the training rows each.

    Args:
        contenders: by name; ``terms_of(model, terms)`` for terms of a model.
        batches: the training rows.
        rates: rising; for all contenders, or for each by its name. ``rates_around()`` by default.
        loss: what is minimised, of a model and a batch.
        losses: of each example ``(B,)``, what judges.
        recipe: of the training that the race is for; ``lr``, ``compile`` and ``graphs`` do not
            matter. No racer trains for longer than this would.
        budget: cost of the whole race at most, in passes over all rows. A row that judges costs
            a third of one that trains.
        seed: of the parts, the batches' order and dropout. The same seed gives the same outcome
            to the bit on one machine.
        progress: show how far it is, on stderr: a bar, and lines in a log file.
    Returns: the racers, the best first. The random state is as it was, and models are as their
        contenders leave them, also after Ctrl-C.
    Raises: AuditionError for no contender, rates that do not rise, ranks with other rows or
        arguments than each other, or where every racer diverged; NoRaceError, its kind, for fewer
        than four rows, labels that are all the same, or a budget that is too small.
    """
    grid, recipe = _grid(contenders, rates), recipe or Recipe()
    racing = order = [(name, rate) for name, own in grid.items() for rate in own]
    found: list[dict[Entry, Tensor | str]] = []
    begun = time.perf_counter()
    with (
        parallel.meeting("audition") as ranks,
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", BeftWarning)  # whoever trains in the end is told
        track = _Track(batches, loss, losses, recipe, seed)
        rungs = track.planned(len(order), budget)
        if ranks.size > 1:
            plan = repr((grid, recipe, budget, seed))
            ranks.agree(AuditionError, the_rows=batches.digest(), arguments=plan)
        total = sum(rung.racers * rung.steps for rung in rungs) * track.folds
        with Count("audition", total, progress and ranks.rank == 0) as count:
            for rung in rungs:
                found.append(track.race(contenders, racing[: rung.racers], rung, count.add))
                racing = _ranked(found[-1])
                order = [*racing, *(e for e in order if e not in racing)]
                if len(racing) == 1:
                    break
        racers = _placed(order, found, [track.learnt(rung) for rung in rungs])
        seconds = time.perf_counter() - begun
        cost = sum(ranks.gather(track.epochs))
        return ranks.first(Audition(racers, rungs[: len(found)], grid, track.folds, cost, seconds))


def _grid(
    contenders: Mapping[str, Contender],
    rates: Sequence[float] | Mapping[str, Sequence[float]] | None,
) -> dict[str, tuple[float, ...]]:
    """The rates of each contender. Raises AuditionError."""
    if not contenders:
        raise AuditionError("there is no contender: give at least one")
    rates = rates_around() if rates is None else rates
    given = rates if isinstance(rates, Mapping) else dict.fromkeys(contenders, rates)
    if given.keys() != contenders.keys():
        odd = sorted(given.keys() ^ contenders.keys())[0]
        raise AuditionError(
            f"rates and contenders must have the same names, and '{odd}' is not both"
        )
    for name, own in given.items():
        rising = all(a < b for a, b in pairwise(own))
        if not own or not rising or not all(0 < rate < math.inf for rate in own):
            listed = ", ".join(f"{rate:g}" for rate in own) or "none"
            raise AuditionError(
                f"the rates of '{name}' must be positive numbers that rise, but are {listed}"
            )
    return {name: tuple(map(float, own)) for name, own in given.items()}


def _ranked(found: Mapping[Entry, Tensor | str]) -> list[Entry]:
    """Who did not diverge, the best first; of equals the smaller rate, then the earlier one."""
    means = {e: float(v.mean()) for e, v in found.items() if isinstance(v, Tensor)}
    if not means:
        reason = next(iter(found.values()))
        raise AuditionError(f"every racer diverged ({reason}): give smaller rates")
    return sorted(means, key=lambda e: (means[e], e[1]))


def _placed(
    order: Sequence[Entry],
    found: Sequence[Mapping[Entry, Tensor | str]],
    learnt: Sequence[int],
) -> tuple[Racer, ...]:
    """The racers, the winner first; learnt: rows that each rung's racers learnt from."""
    racers = []
    for entry in order:
        rung = max(i for i, results in enumerate(found) if entry in results)
        own, first = found[rung][entry], found[rung][order[0]]
        if isinstance(own, str) or isinstance(first, str):
            racers.append(Racer(*entry, rung + 1, None, None, None, f"diverged: {own}"))
            continue
        fate = "won" if entry == order[0] else "raced to the end"
        if rung + 1 < len(found):
            fate = f"left after rung {rung + 1}"
        numbers = float(own.mean()), *paired(own, first, learnt[rung])
        racers.append(Racer(*entry, rung + 1, *numbers, fate))
    return tuple(racers)


class _Track:
    """The rows in parts, and what is run on them.

    Attributes:
        splits: rows that train and rows that judge, by chance and with like labels, for each fold.
        epochs: passes over all rows that were spent so far.
    """

    def __init__(
        self, batches: Rows, loss: Loss, losses: Losses, recipe: Recipe, seed: int
    ) -> None:
        _check_rows(batches)
        self.batches, self.loss, self.losses = batches, loss, losses
        self.recipe, self.seed, self.epochs = recipe, seed, 0.0
        self.splits = _splits(batches.rows, seed)
        self.folds = len(self.splits)

    def planned(self, racers: int, budget: float) -> tuple[Rung, ...]:
        """The rungs that ``budget`` pays for. Raises AuditionError, NoRaceError where none."""
        if not 0 < budget < math.inf:
            raise AuditionError(f"the budget must be a positive number, but is {budget}")
        total, counts = len(self.batches.rows), [racers]
        while counts[-1] > FINALISTS:
            counts.append(-(-counts[-1] // 2))
        shares = [2.0 ** (r + 1 - len(counts)) for r in range(len(counts))]
        rows = [sum(len(_first(held, s)) for _, held in self.splits) for s in shares]
        judging = JUDGING * sum(n * k for n, k in zip(counts, rows, strict=True))
        # Of one step in the first rung, two in the second, and so on.
        size = min(self.batches.size, len(self.splits[0][0]))
        training = sum(n * 2**r for r, n in enumerate(counts)) * size * self.folds
        steps = (budget * total - judging) / training
        if steps < 1:
            least = math.ceil((judging + training) / total * 10) / 10
            raise NoRaceError(
                f"a budget of {budget:g} epochs of {total} rows is too small for {racers} racers "
                f"(contenders times rates): give {least:g} or more"
            )
        longest = self.recipe.epochs * len(self.batches.part(self.splits[0][0]))
        return tuple(
            Rung(n, min(int(steps * 2**r), longest), rows[r], shares[r])
            for r, n in enumerate(counts)
        )

    def learnt(self, rung: Rung) -> int:
        """Rows that a racer learnt from."""
        return min(len(self.splits[0][0]), rung.steps * self.batches.size)

    def race(
        self,
        contenders: Mapping[str, Contender],
        entries: Sequence[Entry],
        rung: Rung,
        tick: Tick,
    ) -> dict[Entry, Tensor | str]:
        """The held-out losses of each racer, float64, or why it has none.

        Ranks share the racers: each trains some of them from start to end.
        """
        ranks = parallel.here()
        racing = sorted(entries, key=lambda e: (list(contenders).index(e[0]), e[1]))
        with parallel.alone():
            mine = self._race(contenders, racing[ranks.rank :: ranks.size], rung, tick)
        found = {entry: result for part in ranks.gather(mine) for entry, result in part.items()}
        return {entry: found[entry] for entry in racing}

    def _race(
        self,
        contenders: Mapping[str, Contender],
        entries: Sequence[Entry],
        rung: Rung,
        tick: Tick,
    ) -> dict[Entry, Tensor | str]:
        found: dict[Entry, Tensor | str] = {}
        for name, contender in contenders.items():
            rates = [rate for own, rate in entries if own == name]
            if not rates:
                continue
            with contender() as model:
                start = _Start(model, name)
                for rate in rates:
                    try:
                        parts = [self._fold(start, rate, rung, s, tick) for s in self.splits]
                        found[name, rate] = torch.cat(parts)
                    except _Diverged as reason:
                        found[name, rate] = str(reason)
        return found

    def _fold(self, start: _Start, rate: float, rung: Rung, split: Split, tick: Tick) -> Tensor:
        start.again()
        torch.manual_seed(self.seed)
        self._train(start, rate, rung.steps, split[0], tick)
        return self._judge(start, _first(split[1], rung.share))

    def _train(self, start: _Start, rate: float, steps: int, rows: list[int], tick: Tick) -> None:
        recipe, model = self.recipe, start.model
        optimizer = BiasAdamW(
            model, lr=rate, weight_decay=recipe.weight_decay, max_grad_norm=recipe.max_grad_norm
        )
        step = EagerStep(model, optimizer, self.loss, recipe.bf16, recipe.parts)
        model.train()
        for number, batch in enumerate(islice(self._batches(rows), steps)):
            factor = rate_factor(number, steps, recipe.warmup, recipe.decay)
            loss, norm = step(on_device(batch, start.device), rate * factor)
            self.epochs += rows_of(batch) / len(self.batches.rows)
            tick()
            for what, value in (("loss", loss), ("gradient", norm)):
                if not math.isfinite(float(value)):
                    raise _Diverged(f"the {what} is not finite at step {number + 1}")

    def _batches(self, rows: list[int]) -> Iterator[dict[str, Tensor]]:
        part = self.batches.part(rows, self.seed)
        while True:
            yield from part

    @torch.no_grad()
    def _judge(self, start: _Start, rows: list[int]) -> Tensor:
        part = self.batches.part(rows)
        found = torch.empty(len(rows), dtype=torch.float64)
        start.model.eval()
        for places, batch in zip(part.plan(), part, strict=True):
            with torch.autocast(start.device.type, torch.bfloat16, enabled=self.recipe.bf16):
                losses = self.losses(start.model, on_device(batch, start.device))
            if losses.shape != (len(places),):
                raise AuditionError(
                    f"losses gave the shape {tuple(losses.shape)} for {len(places)} examples: "
                    "return one loss for each"
                )
            found[places] = losses.double().cpu()
        self.epochs += JUDGING * len(rows) / len(self.batches.rows)
        if not bool(found.isfinite().all()):
            raise _Diverged("its held-out loss is not finite")
        return found


class _Start:
    """What a contender's model holds before it trains: every race begins there."""

    def __init__(self, model: nn.Module, name: str) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise AuditionError(f"contender '{name}' trains nothing")
        if sharded(model):
            raise AuditionError(
                f"contender '{name}' is sharded, and racers are divided among the processes, each "
                "with a whole model: give the rate, or race a smaller model"
            )
        self.model, self.device = model, device_of(model)
        self.values = [(t, t.detach().clone()) for t in (*trained, *model.buffers())]

    @torch.no_grad()
    def again(self) -> None:
        for tensor, value in self.values:
            tensor.copy_(value)


def _first(rows: list[int], share: float) -> list[int]:
    return rows[: math.ceil(share * len(rows))]


def _splits(rows: Sequence[Any], seed: int) -> list[Split]:
    """For each fold; rows of a group never part."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    folds, parts = (HALVES, HALVES) if len(order) <= FOLDED else (1, FIFTHS)
    by_label = sorted(_groups(rows, order), key=lambda group: rows[group[0]].label)
    splits = []
    for fold in range(folds):
        held = {row for group in by_label[fold::parts] for row in group}
        splits.append(([i for i in order if i not in held], [i for i in order if i in held]))
    return splits


def _groups(rows: Sequence[Any], order: Sequence[int]) -> list[list[int]]:
    """Rows that belong together, in an order of all rows."""
    found: dict[object, list[int]] = {}
    for row in order:
        group = getattr(rows[row], "group", None)
        found.setdefault((row,) if group is None else group, []).append(row)
    return list(found.values())


def _check_rows(batches: Rows) -> None:
    if not hasattr(batches, "part"):
        raise AuditionError(
            "an audition trains on some rows and judges by others: give beft_ext.tasks.Batches, "
            f"which can be parted, and not a {type(batches).__name__}"
        )
    rows = batches.rows
    apart = len(_groups(rows, range(len(rows))))
    if apart < FEWEST:
        grouped = " that belong to different groups" if apart < len(rows) else ""
        raise NoRaceError(
            f"an audition needs {FEWEST} rows at least{grouped}, but there are {apart}"
        )
    labels = next(iter(batches.part([0]))).get("labels")
    if labels is not None and labels.ndim == 1 and len({row.label for row in rows}) == 1:
        raise NoRaceError(
            f"every row has the label {rows[0].label:g}: there is nothing to be learnt from them"
        )
