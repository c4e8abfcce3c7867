"""Progress: a bar where it can be overprinted, lines in a log file, nothing where it is not
asked for."""

import io
import sys

import pytest

from beft_ext import progress
from beft_ext.progress import Count


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Notebook(io.StringIO):
    """ipykernel's stream is no terminal, and known by its home."""


Notebook.__module__ = "ipykernel.iostream"


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)


def shown(monkeypatch, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    with Count("rows", 4, **options) as count:
        count.add(said={"loss": "0.5"})
        count.to(3)
        count.make_room()
        count.add()
    return stream.getvalue()


def test_a_log_file_has_lines(monkeypatch, at_once):
    lines = shown(monkeypatch, io.StringIO()).splitlines()
    assert lines == [f"rows: {done} of 4, 0 s, loss 0.5" for done in (1, 3, 4)]


def test_the_first_line_comes_after_ten_seconds_the_next_after_a_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    count = Count("rows")
    for now[0] in range(81):
        count.add()
    assert stream.getvalue().splitlines() == ["rows: 11, 10 s", "rows: 71, 70 s"]


@pytest.mark.parametrize("stream", [Terminal, Notebook])
def test_a_terminal_and_a_notebook_have_a_bar_that_goes_away(monkeypatch, stream):
    told = shown(monkeypatch, stream())
    assert "rows:   0%|" in told and "/4 [" in told and "\n" not in told
    assert told.rstrip(" \r").rindex("\r") < len(told) - 2  # overprinted with blanks


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_is_not_asked_for_is_not_shown(monkeypatch, at_once, stream):
    assert shown(monkeypatch, stream(), shown=False) == ""
