"""Memory that runs out in the middle of a command: which, for what, and what to lower."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from beft_ext.commands.loading import WorkflowError

# What torch's allocator of the host says; it has no class of error for it.
HOST = re.compile(r"(can't allocate memory|not enough memory): you tried to allocate")
AMOUNT = re.compile(r"tried to allocate ([0-9.]+ ?[A-Za-z]+)", re.IGNORECASE)
# By the name of an argument: what takes less memory when it is lower, or is given.
LOWER = {"batch_size": "--batch-size", "max_length": "--max-length", "memory": "--memory"}
GIVE = {"gradient_checkpointing": "--gradient-checkpointing", "bf16": "--bf16"}


@contextmanager
def enough_memory(arguments: Namespace) -> Iterator[None]:
    """Raises WorkflowError where there is not. arguments: of the command line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        host = isinstance(error, MemoryError) or HOST.search(str(error)) is not None
        if not host and not isinstance(error, torch.OutOfMemoryError):
            raise
        amount = AMOUNT.search(str(error))
        wanted = f" ({amount[1]} were asked for)" if amount else ""
        place = "the host" if host else "the GPU"
        raise WorkflowError(f"{place} is out of memory{wanted}: {_advice(arguments)}") from error


def _advice(arguments: Namespace) -> str:
    given = vars(arguments)
    lower = [
        option if given[name] is None else f"{option} ({given[name]})"
        for name, option in LOWER.items()
        if name in given
    ]
    give = [option for name, option in GIVE.items() if given.get(name) is False]
    parts = [f"lower {' or '.join(lower)}"] if lower else []
    parts += [f"give {' or '.join(give)}"] if give else []
    return ", or ".join(parts) or "take a smaller model, or a machine with more"
