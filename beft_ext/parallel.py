"""The processes that work on one model together: what they tell each other, and who is missing.

A call that all ranks make is a meeting: they wait for each other at its door, then exchange
numbers, gradients of biases and parts of Gram matrices, over a gloo group of our own. Every
exchange begins with a word from each rank: that it goes on, or how it failed. So what fails on one
fails on all, with that rank's own sentence. Who sends no word in time is named.

Without a process group everything here is of one rank and costs nothing.
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from beft_ext.errors import BeftError, BeftWarning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")
S = TypeVar("S")

PATIENCE = "BEFT_RANK_TIMEOUT"  # seconds that ranks wait for each other
LONGEST = 1800.0  # without it
ALONE = 30.0  # seconds after which a plain model's call goes on by itself, where nobody else came
CALLING = 10.0  # seconds in which a rank that still runs answers once another one was lost
BLOCK = 2**24  # elements that are added up at a time
OBJECTS, SUMS, ROWS, FORWARD, BACKWARD = range(5)  # what ranks are about to do together


class RankError(BeftError, RuntimeError):
    """Ranks that did not come, fell silent, or do not do the same."""


def patience() -> float:
    """Seconds that ranks wait for each other. Raises RankError where the environment has none."""
    given = os.environ.get(PATIENCE, str(LONGEST))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RankError(f"{PATIENCE} must be a positive number of seconds, but is '{given}'")
    return seconds


@dataclass(eq=False)
class Ranks:
    """The ranks of a meeting; of one rank where there is no process group.

    Attributes:
        rank, size: this one's number and how many there are.
        met: number of meetings that were held.
    """

    rank: int = 0
    size: int = 1
    met: int = 0
    _group: ProcessGroup | None = None
    _store: Store | None = None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        if self.size == 1:
            return [value]
        return [pickle.loads(b) for b in self._bytes(OBJECTS, pickle.dumps(value))]

    def first(self, value: T) -> T:
        """Rank 0's value, the same to the bit on every rank."""
        if self.size == 1:
            return value
        return self.gather(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """``function`` of every item. Each rank computes some of them and all get all."""
        items = list(items)
        mine = [function(item) for item in items[self.rank :: self.size]]
        if self.size == 1:
            return mine
        parts = [iter(part) for part in self.gather(mine)]
        return [next(parts[i % self.size]) for i in range(len(items))]

    def agree(self, error: type[BeftError], **facts: str) -> None:
        """Raise ``error`` where a fact (by its name, ``_`` for a space) differs between ranks."""
        told = self.gather(facts)
        for name in facts:
            if other := [r for r, own in enumerate(told) if own[name] != told[0][name]]:
                raise error(
                    f"{_named(other)} and rank 0 differ in {name.replace('_', ' ')}: start all "
                    "ranks with the same"
                )

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors in place, in fp32 at least; the same to the bit on every rank."""
        if self.size == 1:
            return
        wide = torch.float32
        for tensor in tensors:
            wide = torch.promote_types(wide, tensor.dtype)
        for part in _blocks(tensors):
            flat = torch.cat([t.detach().flatten().to("cpu", wide) for t in part])
            self._open(SUMS, len(flat))
            self._run(dist.all_reduce, flat)
            sizes = [t.numel() for t in part]
            for tensor, total in zip(part, flat.split(sizes), strict=True):
                tensor.copy_(total.view_as(tensor))

    def rows(self, tensor: Tensor) -> Iterator[Tensor]:
        """Each rank's rows ``(n, H)`` in turn, so that no more than one rank's are here at once."""
        if self.size == 1:
            yield tensor
            return
        for rank in range(self.size):
            count = self._open(ROWS, len(tensor))[rank]
            own = rank == self.rank
            block = tensor.cpu().contiguous() if own else torch.empty(
                count, *tensor.shape[1:], dtype=tensor.dtype, device="cpu"
            )  # fmt: skip
            self._run(dist.broadcast, block, rank)
            yield tensor if own else block.to(tensor.device)

    def begin(self, kind: int) -> None:
        """All begin a ``FORWARD`` or a ``BACKWARD`` of a model that is spread over them."""
        if self.size > 1:
            self._open(kind, 0)

    def seed(self, seed: int) -> int:
        """A seed of this rank's own: rank 0 has the one that is given."""
        return seed + 1_000_003 * self.rank

    def tell(self, error: BaseException | None) -> None:
        """The last word of a meeting: how this rank failed, or that it is done."""
        if self.size > 1:
            self._open(OBJECTS, 0, error)

    def _open(self, kind: int, count: int, failure: BaseException | None = None) -> list[int]:
        """Every rank's word: what it is about to exchange, or that it failed."""
        said = b"" if failure is None else pickle.dumps(_said(failure))
        word = [kind, len(said) or count, int(failure is not None)]
        words = self._all_gather(torch.tensor(word, device="cpu"))
        if any(int(w[2]) for w in words):
            told = self._padded(said, [int(w[1]) * int(w[2]) for w in words])
            if failure is None:
                rank, found = next((r, f) for r, f in enumerate(told) if f)
                raise _again(rank, *pickle.loads(found))
            setattr(failure, _TOLD, True)
        kinds = {int(w[0]) for w in words}
        if len(kinds) > 1 and failure is None:
            raise known(RankError("the ranks do not do the same: let all make the same calls"))
        return [int(w[1]) for w in words]

    def _bytes(self, kind: int, mine: bytes) -> list[bytes]:
        return self._padded(mine, self._open(kind, len(mine)))

    def _padded(self, mine: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Every rank's bytes; sizes: their numbers."""
        room = torch.zeros(max(1, *sizes), dtype=torch.uint8, device="cpu")
        if mine:
            room[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        found = self._all_gather(room)
        return [t[:n].numpy().tobytes() for t, n in zip(found, sizes, strict=True)]

    def _all_gather(self, mine: Tensor) -> list[Tensor]:
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._run(dist.all_gather, found, mine)
        return found

    def _run(self, exchange: Callable[..., object], *arguments: object) -> None:
        """Raises RankError, with the ranks that are missing, where an exchange is not completed."""
        try:
            exchange(*arguments, group=self._group)
        except RuntimeError as error:
            raise known(RankError(self._lost(error))) from error

    def _lost(self, error: RuntimeError) -> str:
        assert self._store is not None
        silent = [0]  # where the store has gone with the rank that held it
        try:
            self._store.add(f"lost/{self.rank}", 1)
            self._hang_up(error)
            silent = self._silent("lost", range(self.size))
            self._store.add(f"told/{self.rank}", 1)
            if self.rank == 0:  # the store may end with this process, and others are asking
                self._silent("told", [r for r in range(self.size) if r not in silent])
        except RuntimeError:
            pass
        if not silent:
            return f"the ranks lost each other ({str(error).splitlines()[0]}): start all anew"
        return (
            f"{_named(silent)} ended, or did not answer within {patience():g} s: see what is "
            f"printed there; {PATIENCE} sets the seconds to wait"
        )

    def _silent(self, word: str, ranks: Iterable[int]) -> list[int]:
        """Those of ``ranks`` that do not say the word within ``CALLING`` seconds."""
        store, until = self._store, time.monotonic() + CALLING
        assert store is not None
        while silent := [r for r in ranks if not store.add(f"{word}/{r}", 0)]:
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        return silent

    def _hang_up(self, error: RuntimeError) -> None:
        """Close this rank's connections. Who is no neighbour of the lost one hears of it so, and
        would else wait for as long as ``patience`` says."""
        traceback.clear_frames(error.__traceback__)  # they hold the group
        group, self._group = self._group, None
        dist.destroy_process_group(group)


_TOLD = "_beft_told"  # on an error that all ranks know of


def is_told(error: BaseException) -> bool:
    """Whether all ranks raise this error, or one that says the same."""
    return getattr(error, _TOLD, False)


def known(error: T) -> T:
    """The error, marked as one that all ranks raise."""
    setattr(error, _TOLD, True)
    return error


def _said(error: BaseException) -> tuple[type[BeftError] | None, str]:
    """The error's kind, as far as others can make one of it, and its words."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not isinstance(error, BeftError):
        return None, f"{type(error).__name__}: {words}"
    plain = (k for k in type(error).__mro__ if "__init__" not in vars(k))
    return next(k for k in plain if issubclass(k, BeftError)), words


def _again(rank: int, kind: type[BeftError] | None, words: str) -> BeftError:
    return known((kind or RankError)(f"rank {rank}: {words}"))


def _named(ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, so many at a time that they have ``BLOCK`` elements or so."""
    block: list[Tensor] = []
    for tensor in tensors:
        block.append(tensor)
        if sum(t.numel() for t in block) >= BLOCK:
            yield block
            block = []
    if block:
        yield block


_here: Ranks | None = None  # of the meeting that is held
_home: tuple[Any, Ranks] | None = None  # the process group, and its ranks


def here() -> Ranks:
    """The ranks of the meeting that is held; one rank outside of any."""
    return _here or Ranks()


def leads() -> bool:
    """Whether this process writes and prints: rank 0, or the only one."""
    return here().rank == 0


def forget() -> None:
    """Let go of the process group before it is destroyed: its threads end with its last holder, and
    must not outlive the interpreter."""
    global _home
    _home = None


def held() -> bool:
    """Whether this is within a meeting, or within ``alone``."""
    return _here is not None


@contextmanager
def alone() -> Iterator[None]:
    """What is called in between works with this process alone, whatever process group there is.

    Example:
        >>> from beft_ext import parallel
        >>> with parallel.alone():
        ...     parallel.here().size
        1
    """
    with _holding(Ranks()):
        yield


@contextmanager
def meeting(what: str, promised: bool = False) -> Iterator[Ranks]:
    """All ranks do the same in between; what fails on one fails on all.

    Within a meeting another one is a part of it. Where there is one process there is one rank.

    Args:
        what: a call's name.
        promised: whether all ranks are sure to come, as those that hold a DDP model are. Else,
            where nobody has come after ``ALONE`` seconds, the call goes on by itself, with a
            warning.
    Raises:
        RankError: some ranks came and others did not, or they came to do something else.
    """
    ranks = _here or _met(what, promised)
    if ranks.size == 1:
        with _holding(ranks):
            yield ranks
        return
    with _holding(ranks):
        try:
            yield ranks
        except Exception as error:
            if not is_told(error):
                ranks.tell(error)
            raise
        ranks.tell(None)


@contextmanager
def _holding(ranks: Ranks) -> Iterator[None]:
    global _here
    before, _here = _here, ranks
    try:
        yield
    finally:
        _here = before


def _met(what: str, promised: bool) -> Ranks:
    """The ranks that came to ``what``: all of them, or this one."""
    global _home
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()
    world = dist.group.WORLD
    if _home is None or _home[0] is not world:
        store = dist.PrefixStore("beft_ext", dist.distributed_c10d._get_default_store())
        _home = world, Ranks(dist.get_rank(), dist.get_world_size(), _store=store)
    ranks = _home[1]
    if not _wait(ranks, what, patience() if promised else min(ALONE, patience())):
        warnings.warn(
            f"only rank {ranks.rank} of {ranks.size} came to {what}, so it works with its own "
            "data alone: call it on every rank or, for one process, within "
            "beft_ext.parallel.alone()",
            BeftWarning,
            stacklevel=5,
        )
        return Ranks()
    if ranks._group is None:
        if not dist.is_gloo_available():
            raise RankError("several processes need torch's gloo backend, which is missing here")
        limit = timedelta(seconds=patience())
        ranks._group = dist.new_group(backend="gloo", timeout=limit)
    return ranks


def _wait(ranks: Ranks, what: str, seconds: float) -> bool:
    """Wait at a meeting's door. False where nobody came in so many seconds, and nobody will.

    A rank that is there has an odd number. One that gives up leaves before it looks for the last
    time, and who comes arrives before it looks for the first: they cannot miss each other.
    """
    store = ranks._store
    assert store is not None
    doors = [f"{ranks.met}/{rank}" for rank in range(ranks.size)]

    def present() -> list[int]:
        return [r for r, door in enumerate(doors) if store.add(door, 0) % 2]

    store.set(f"{doors[ranks.rank]}/what", what)
    store.add(doors[ranks.rank], 1)
    begun, pause = time.monotonic(), 0.001
    while len(there := present()) < ranks.size:
        waited = time.monotonic() - begun
        if len(there) > 1 and waited > patience():
            store.add(doors[ranks.rank], 1)
            absent = [r for r in range(ranks.size) if r not in there]
            raise RankError(
                f"{_named(absent)} did not come to {what} within {patience():g} s, or ended: call "
                f"it on every rank; {PATIENCE} sets the seconds to wait"
            )
        if len(there) == 1 and waited > seconds:
            store.add(doors[ranks.rank], 1)
            if not present():
                return False
            store.add(doors[ranks.rank], 1)  # one came at this very moment
        time.sleep(pause)
        pause = min(0.2, 2 * pause)
    asked = [store.get(f"{door}/what").decode() for door in doors]
    ranks.met += 1
    if other := [r for r, call in enumerate(asked) if call != what]:
        raise known(
            RankError(
                f"{_named(other)} came to {asked[other[0]]} and rank {ranks.rank} to {what}: let "
                "all ranks make the same calls in the same order"
            )
        )
    return True
