"""Memory that runs out in the middle of a command: which, for what, and what to lower."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from beft_ext.commands.loading import WorkflowError
from beft_ext.errors import BeftError
from beft_ext.parallel import is_told, known
from beft_ext.training.parts import FULL, shortage_of

ELSEWHERE = re.compile(r"rank [0-9]+: ")  # before what another rank said
AMOUNT = re.compile(r"tried to allocate ([0-9.]+ ?[A-Za-z]+)", re.IGNORECASE)
# By the name of an argument: what takes less memory when it is lower, or is given.
LOWER = {"batch_size": "--batch-size", "max_length": "--max-length", "memory": "--memory"}
GIVE = {"gradient_checkpointing": "--gradient-checkpointing", "bf16": "--bf16"}


@contextmanager
def enough_memory(arguments: Namespace) -> Iterator[None]:
    """Raises WorkflowError where there is not. arguments: of the command line."""
    try:
        yield
    except (RuntimeError, MemoryError, BeftError) as error:
        found = shortage_of(error)
        if found is None or f"is {FULL[0]}" in str(error):  # another rank has said it in this way
            raise
        amount, rank = AMOUNT.search(str(found)), ELSEWHERE.match(str(error))
        wanted = f" ({amount[1]} were asked for)" if amount else ""
        place = "the GPU" if FULL[0] in str(found) else "the host"
        where = f"{rank[0] if rank else ''}{place}"
        said = WorkflowError(f"{where} is {FULL[0]}{wanted}: {_advice(arguments)}")
        raise (known(said) if is_told(error) else said) from error


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
