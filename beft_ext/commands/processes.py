"""One command run by several processes, as torchrun and ``accelerate launch`` start them.

Rank 0 alone prints. What fails on one rank fails on all, with exit code 2 for bad input.
"""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from beft_ext import parallel
from beft_ext.commands.loading import WorkflowError
from beft_ext.tasks import Batches
from beft_ext.tasks.streams import Stream


def _number(name: str, otherwise: int) -> int:
    given = os.environ.get(name, "")
    return int(given) if given.isdecimal() else otherwise


def speaks(error: BaseException | None = None) -> bool:
    """Whether this process prints: rank 0 whatever it is, another one what rank 0 does not know."""
    first = _number("RANK", 0) == 0 or _number("WORLD_SIZE", 1) == 1
    return first or (error is not None and not parallel.is_told(error))


@contextmanager
def one_voice() -> Iterator[None]:
    """Only rank 0 is heard in between."""
    with ExitStack() as stack:
        if not speaks():
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
        yield


@contextmanager
def together(arguments: Namespace) -> Iterator[None]:
    """A meeting of all processes of the job; nothing where there is one.

    arguments: of the command line, with its ``verb`` and whether that is for several (``joint``).
    Raises WorkflowError for a verb of one process, for arguments that differ between ranks, or
    where the processes do not find each other.
    """
    verb = arguments.verb
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield
        return
    try:
        if not arguments.joint:
            raise parallel.known(
                WorkflowError(
                    f"beft-ext {verb} is for one process, and {size} were started: start it "
                    "without torchrun"
                )
            )
        _connect()
        try:
            with one_voice(), parallel.meeting(f"beft-ext {verb}", promised=True) as ranks:
                told = {k: v for k, v in vars(arguments).items() if not callable(v)}
                ranks.agree(WorkflowError, the_arguments=repr(told))
                yield
        finally:
            parallel.forget()
            dist.destroy_process_group()
    except Exception:
        # Each process ends with its own exit code, though torchrun ends all once one has ended.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise


def _connect() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    if not dist.is_available() or not dist.is_gloo_available():
        raise WorkflowError("several processes need torch's gloo backend, which is missing here")
    try:
        limit = timedelta(seconds=parallel.patience())
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=limit)))
        # torchrun keeps one store for all starts: what ranks that are dead said of themselves there
        # must not be taken for what the living say.
        store = dist.PrefixStore(f"start {_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WorkflowError(
            f"the processes do not find each other ({reason}): start them with torchrun"
        ) from error


def shared_by_all(batches: Batches) -> Batches:
    """Rows that all ranks have. Raises WorkflowError where one has others."""
    if (ranks := parallel.here()).size > 1:
        ranks.agree(WorkflowError, the_rows_or_the_tokenizer=batches.digest())
    return batches


def own_part(loader: Batches) -> Batches:
    """What this rank reads of every batch; all of it where there is one process.

    Raises WorkflowError where ranks have other rows than each other, or one has none.
    """
    ranks = parallel.here()
    if ranks.size == 1:
        return loader
    own = shared_by_all(loader).shared(ranks.rank, ranks.size)
    if isinstance(own, Stream):  # each batch of the same rows is cut as it is read
        numbers, lacking = "rows", list(range(loader.size, ranks.size))
    else:
        parts = ranks.gather(own.own(epoch=0))
        assert sorted(row for part in parts for row in part) == list(range(len(loader.rows)))
        numbers, lacking = str(len(loader.rows)), [r for r, part in enumerate(parts) if not part]
    if lacking:
        raise WorkflowError(
            f"rank {lacking[0]} has no row: {numbers} in batches of {loader.size} are too "
            f"few for {ranks.size} processes; start fewer, or raise --batch-size"
        )
    return own
