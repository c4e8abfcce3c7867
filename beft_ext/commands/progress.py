"""How far a pass over batches is: a bar on a terminal, and lines in a log file or a notebook."""

from __future__ import annotations

import copy
import sys
import time

from tqdm import tqdm

from beft_ext.tasks import Batches

FIRST, EVERY = 10.0, 60.0  # seconds to a log's first line, and from line to line


class Count:
    """Counts on stderr what is done. total: None where it is not known."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._of = what, "" if total is None else f" of {total}"
        self._start = time.monotonic()
        self._due, self._done = self._start + FIRST, 0
        self._bar = tqdm(desc=what, total=total, leave=False) if sys.stderr.isatty() else None

    def add(self, number: int = 1) -> None:
        """So many more are done."""
        self._done += number
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(number)
        elif now >= self._due:
            seconds = f"{now - self._start:.0f} s"
            print(f"{self._what}: {self._done}{self._of}, {seconds}", file=sys.stderr, flush=True)
            self._due = now + EVERY

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()


def watched(batches: Batches, *what: str, most: int | None = None) -> Batches:
    """Batches whose passes are shown.

    what: the passes' names, the first's first; the last name is that of all that follow. An empty
    name shows nothing. most: batches that a pass takes at most.
    """
    found = copy.copy(batches)
    found.taken = _Shown(list(what), most).taken
    return found


class _Shown:
    def __init__(self, names: list[str], most: int | None) -> None:
        self._names, self._most = names, most
        self._count: Count | None = None

    def taken(self, done: int, of: int | None) -> None:
        if done == 1:
            if self._count is not None:  # of a pass that was broken off
                self._count.close()
            what = self._names.pop(0) if len(self._names) > 1 else self._names[0]
            known = [number for number in (of, self._most) if number is not None]
            self._count = Count(what, min(known, default=None)) if what else None
        if self._count is not None:
            self._count.add()
            if done == of:
                self._count.close()
