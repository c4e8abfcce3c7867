"""How far a work is: a bar on a terminal and in a notebook, lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

FIRST, EVERY = 10.0, 60.0  # seconds to a log's first line, and from line to line


class Count:
    """Counts on stderr what is done.

    Args:
        what: is counted, in a word.
        total: how many there will be, None where it is not known.
        shown: False counts in silence.
        done: how many there are already.
    """

    def __init__(
        self, what: str, total: int | None = None, shown: bool = True, done: int = 0
    ) -> None:
        self.shown = shown
        self._what, self._total, self._done = what, total, done
        self._said: dict[str, str] = {}
        self._start = time.monotonic()
        self._due = self._start + FIRST
        self._bar: Any = None  # tqdm's
        if shown and _takes_bars():
            from tqdm import tqdm

            self._bar = tqdm(desc=what, total=total, initial=done, leave=False)

    def add(self, number: int = 1, said: Mapping[str, str] | None = None) -> None:
        """So many more are done; said: what else is known by now, by its name."""
        self._done += number
        self._said |= said or {}
        if self._bar is not None:
            if said:
                self._bar.set_postfix(self._said, refresh=False)
            self._bar.update(number)
        elif self.shown and time.monotonic() >= self._due:
            self._line()

    def to(self, done: int) -> None:
        """So many are done by now."""
        self.add(done - self._done)

    def _line(self) -> None:
        now = time.monotonic()
        of = "" if self._total is None else f" of {self._total}"
        told = [f"{self._what}: {self._done}{of}", f"{now - self._start:.0f} s"]
        told += [f"{name} {value}" for name, value in self._said.items()]
        print(", ".join(told), file=sys.stderr, flush=True)
        self._due = now + EVERY

    def make_room(self) -> None:
        """Take the bar off the screen until the next one is done: a line is to be printed."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Count:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _takes_bars() -> bool:
    """Whether what is printed can be overprinted: a notebook's stream can, and is no terminal."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
