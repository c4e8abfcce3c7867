"""Rows of comma- and tab-separated files: every cell a text, and whether quotes mean anything.

pyarrow cuts the cells. Two things are settled before, since a parser that errs in them loses rows
without a word: a quoted cell must end where it says, and a tab-separated file has no quoting
unless its cells show it (GLUE's files have none, and words in them begin with a quote).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from beft_ext.tasks.cells import DataError, Row, distinct, undivided

if TYPE_CHECKING:
    from pyarrow import ChunkedArray
    from pyarrow.csv import InvalidRow

_QUOTED = r'"[^"]*+(?:""[^"]*+)*"'
_LINES = re.compile(r"[^\r\n]+")
Places = Callable[[Sequence[str]], "list[int] | None"]  # of a header: the columns to be cut, or all


def separated(
    pieces: Callable[[], Iterable[str]], delimiter: str, columns: Collection[str] | None = None
) -> Iterator[Row]:
    """The rows of a file; its first line names the columns.

    Args:
        pieces: gives the file's text in pieces that end where a line does, anew at each call.
        delimiter: a comma, or a tab.
        columns: that are needed; see ``needed``.
    Raises:
        DataError: if a row does not fit the header, with its number; if a quote is not closed, a
            column is named twice, or the file is not UTF-8.
    """
    start = next(iter(pieces()), "")
    if "\0" in start.partition("\n")[0]:
        raise DataError("its header holds NUL characters: save the file as UTF-8")
    quotes = delimiter == "," or _tabs_are_quoted(pieces)

    def places(header: Sequence[str]) -> list[int] | None:
        distinct(header)
        return needed(header, columns)

    for header, *rows in _tables(pieces(), delimiter, quotes, places):
        for row in rows:
            yield dict(zip(header, row, strict=True))


def needed(header: Sequence[str], columns: Collection[str] | None) -> list[int] | None:
    """Where the columns stand that hold what is asked for, by their names or before a dot, at least
    one. None for all columns; also where one is missing, since a message lists those that are
    there."""
    if columns is None:
        return None
    found = {
        n: [i for i, c in enumerate(header) if n == c or n.startswith(f"{c}.")] for n in columns
    }
    if not all(found.values()):
        return None
    return sorted({i for places in found.values() for i in places}) or [0]


def values(column: ChunkedArray) -> list[Any]:
    """A column as Python's values; texts several times faster than one at a time."""
    import pyarrow

    if column.null_count == 0 and column.type in (pyarrow.string(), pyarrow.large_string()):
        return list(column.to_numpy(zero_copy_only=False).tolist())
    return list(column.to_pylist())


def _tables(
    pieces: Iterable[str], delimiter: str, quotes: bool, places: Places = lambda header: None
) -> Iterator[list[tuple[str, ...]]]:
    """The cells of the records that a piece ends: each time the header's first, then some rows'.

    Raises DataError for a record that does not fit the header, or breaks the rules of quoting.
    """
    header, done, cut = "", 0, None
    for text, count in _records(pieces, delimiter, quotes):
        if not header:
            lines = text.lstrip("\r\n")
            found = _record(delimiter, quotes).match(lines)
            end = found.end() if found else len(lines)
            header, text, count = lines[:end].rstrip("\r\n") + "\n", lines[end:], count - 1
            cut = places(_cut(header, delimiter, quotes and '"' in header, 0, None)[0])
        yield _cut(header + text, delimiter, quotes and '"' in header + text, done, cut)
        done += count


def _records(pieces: Iterable[str], delimiter: str, quotes: bool) -> Iterator[tuple[str, int]]:
    """Texts of whole records, with how many are not blank.

    Raises DataError, with its number, for a record that breaks the rules of quoting.
    """
    kept, done = "", 0
    record = _record(delimiter, quotes)
    for piece in pieces:
        kept += piece
        place = count = 0
        if not quotes or '"' not in kept:  # then every line is a record
            place, count = len(kept), len(_LINES.findall(kept))
        while place < len(kept) and (found := record.match(kept, place)):
            count += bool(found.group().strip("\r\n"))
            place = found.end()
        if count:
            yield kept[:place], count
        kept, done = kept[place:], done + count
    if kept:
        named = f"row {done}" if done else "the header"
        raise DataError(
            f"{named}: a cell begins with a quote, which is not closed before the next comma; "
            "write a quote within a quoted cell twice"
        )


def _cut(
    text: str, delimiter: str, quotes: bool, before: int, places: list[int] | None
) -> list[tuple[str, ...]]:
    """The cells of every record, the header's first. before: rows before these; places: of the
    columns, or None for all.

    Raises DataError for one that does not fit.
    """
    import pyarrow
    from pyarrow import csv

    lines = text.strip("\r\n")
    misfits: list[InvalidRow] = []

    def keep(row: InvalidRow) -> str:
        misfits.append(row)
        return "skip"

    data = (lines + "\n").encode()
    first = _record(delimiter, quotes).match(lines)
    width = first.group().count(delimiter) + 1 if first else 1  # cells of the header, or more
    table = csv.read_csv(
        pyarrow.BufferReader(data),
        # One block, for a row of any length must lie within a block.
        csv.ReadOptions(
            use_threads=False,
            block_size=min(len(data), 2**31 - 1),
            autogenerate_column_names=True,
        ),
        csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if quotes else False,
            newlines_in_values=quotes,
            invalid_row_handler=keep,
        ),
        csv.ConvertOptions(
            column_types={f"f{i}": pyarrow.string() for i in range(width)},
            null_values=[],
            include_columns=[f"f{i}" for i in places or ()],
        ),
    )
    if misfits:
        row = misfits[0]
        more = delimiter == "," and row.actual_columns > row.expected_columns
        quoting = "; put quotes around a text that holds a comma" * more
        if first and row.expected_columns == 1:
            quoting = undivided([first.group()]) or quoting
        raise DataError(
            f"row {before + row.number - 1} does not fit the header: it has {row.actual_columns} "
            f"cells, not {row.expected_columns}{quoting}"
        )
    return list(zip(*map(values, table.columns), strict=True))


def _record(delimiter: str, quotes: bool) -> re.Pattern[str]:
    """A record with its line's end. A cell that begins with a quote is quoted to its end; in a
    tab-separated file with quoting no other cell holds a quote."""
    others = rf"[^{delimiter}\r\n]*+" if not quotes or delimiter == "," else r'[^"\t\r\n]*+'
    cell = rf'(?:{_QUOTED}|(?!"){others})' if quotes else others
    return re.compile(rf"{cell}(?:{delimiter}{cell})*(?:\r\n|\r|\n|\Z)")


def _tabs_are_quoted(pieces: Callable[[], Iterable[str]]) -> bool:
    """Whether the quotes of a tab-separated file are quoting.

    They are if every one of them obeys the rules of quoting, and some cell shows that they do: cut
    without quoting the rows do not fit the header, a quote is written twice within a quoted cell,
    or the whole header, or every cell of a column, stands in quotes.
    """
    shown, count = False, 0
    try:
        for text, _ in _records(pieces(), "\t", quotes=True):
            count += '"' in text
    except DataError:
        return False
    if not count:
        return False
    whole, count = re.compile(_QUOTED).fullmatch, 0
    quoted: set[int] | None = None  # columns of which every cell so far stands in quotes
    try:
        for header, *rows in _tables(pieces(), "\t", quotes=False):
            shown |= all(map(whole, header))
            for row in (header, *rows):
                shown |= any(whole(cell) and '""' in cell[1:-1] for cell in row)
            for row in rows:
                own = {i for i, cell in enumerate(row) if whole(cell)}
                quoted = own if quoted is None else quoted & own
            count += len(rows)
    except DataError:
        return True
    return bool(shown or (count > 1 and quoted))
