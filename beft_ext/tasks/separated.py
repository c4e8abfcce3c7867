"""Rows of comma- and tab-separated files: every cell a text, and whether quotes mean anything.

pyarrow cuts the cells. Two things are settled before, since a parser that errs in them loses rows
without a word: a quoted cell must end where it says, and a tab-separated file has no quoting
unless its cells show it (GLUE's files have none, and words in them begin with a quote).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from beft_ext.tasks.cells import DataError, Row, decoded, distinct

if TYPE_CHECKING:
    from pyarrow.csv import InvalidRow

_QUOTED = r'"[^"]*+(?:""[^"]*+)*"'


def separated(data: bytes, delimiter: str) -> list[Row]:
    """The rows of a file; its first line names the columns.

    Args:
        data: the file's bytes, in UTF-8.
        delimiter: a comma, or a tab.
    Raises:
        DataError: if a row does not fit the header, with its number; if a quote is not closed, a
            column is named twice, or the file is not UTF-8.
    """
    text = decoded(data)
    if "\0" in text.partition("\n")[0]:
        raise DataError("its header holds NUL characters: save the file as UTF-8")
    quotes = '"' in text
    if quotes and delimiter == "\t":
        quotes = _tabs_are_quoted(text)
    elif quotes and (row := _unclosed(text, delimiter)) is not None:
        raise DataError(
            f"{_named(row)}: a cell begins with a quote, which is not closed before the next "
            "comma; write a quote within a quoted cell twice"
        )
    header, *rows = _cut(text, delimiter, quotes) or [()]
    distinct(header)
    return [dict(zip(header, row, strict=True)) for row in rows]


def _cut(text: str, delimiter: str, quotes: bool) -> list[tuple[str, ...]]:
    """The cells of every record, the header's first. Raises DataError for one that does not fit."""
    import pyarrow
    from pyarrow import csv

    lines = text.strip("\r\n")
    if not lines:
        return []
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
            column_types={f"f{i}": pyarrow.string() for i in range(width)}, null_values=[]
        ),
    )
    if misfits:
        row = misfits[0]
        more = delimiter == "," and row.actual_columns > row.expected_columns
        raise DataError(
            f"row {row.number - 1} does not fit the header: it has {row.actual_columns} cells, not "
            f"{row.expected_columns}" + "; put quotes around a text that holds a comma" * more
        )
    return list(zip(*(c.to_pylist() for c in table.columns), strict=True))


def _record(delimiter: str, quotes: bool) -> re.Pattern[str]:
    """A record with its line's end. A cell that begins with a quote is quoted to its end; in a
    tab-separated file with quoting no other cell holds a quote."""
    others = rf"[^{delimiter}\r\n]*+" if not quotes or delimiter == "," else r'[^"\t\r\n]*+'
    cell = rf'(?:{_QUOTED}|(?!"){others})' if quotes else others
    return re.compile(rf"{cell}(?:{delimiter}{cell})*(?:\r\n|\r|\n|\Z)")


def _unclosed(text: str, delimiter: str) -> int | None:
    """Number of the first record, of those that are not blank, that breaks the rules of quoting."""
    record, place, count = _record(delimiter, quotes=True), 0, 0
    while place < len(text):
        found = record.match(text, place)
        if found is None:
            return count
        count += bool(found.group().strip("\r\n"))
        place = found.end()
    return None


def _named(record: int) -> str:
    return f"row {record}" if record else "the header"


def _tabs_are_quoted(text: str) -> bool:
    """Whether the quotes of a tab-separated file are quoting.

    They are if every one of them obeys the rules of quoting, and some cell shows that they do: cut
    without quoting the rows do not fit the header, a quote is written twice within a quoted cell,
    or the whole header, or every cell of a column, stands in quotes.
    """
    if _unclosed(text, "\t") is not None:
        return False
    try:
        header, *rows = _cut(text, "\t", quotes=False)
    except DataError:
        return True
    whole = re.compile(_QUOTED).fullmatch
    columns = [header, *(zip(*rows, strict=True) if len(rows) > 1 else ())]
    return any(all(map(whole, cells)) for cells in columns) or any(
        whole(cell) and '""' in cell[1:-1] for row in (header, *rows) for cell in row
    )
