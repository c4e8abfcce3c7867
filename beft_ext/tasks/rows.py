"""Rows of labelled data: local files of four kinds, or a data set of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from beft_ext.errors import BeftError

Row = dict[str, Any]


class DataError(BeftError, ValueError):
    """Data that is missing, empty or not as described."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a csv, tsv, jsonl or parquet file. Raises DataError."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; use {', '.join(_READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        rows = list(reader(path))
    except (ValueError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from error
    if not rows:
        raise DataError(f"{path}: there are no rows")
    return rows


def hub_rows(path: str, name: str | None, split: str) -> list[Row]:
    """The rows of one split of a hub's data set. Raises DataError."""
    try:
        import datasets
    except ImportError as error:
        message = "reading the hub needs datasets: pip install 'beft-ext[data]', or give --data DIR"
        raise DataError(message) from error
    try:
        return list(datasets.load_dataset(path, name, split=split))
    except Exception as error:  # the hub's client raises many unrelated types
        reason = str(error).splitlines()[0]
        wanted = path if name is None else f"{path}, {name}"
        raise DataError(
            f"the hub's '{wanted}' could not be read ({reason}): give --data DIR"
        ) from error


def _jsonl(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                yield row


def _separated(delimiter: str) -> Callable[[Path], Iterable[Row]]:
    def read(path: Path) -> Iterable[Row]:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines, delimiter=delimiter)

    return read


def _parquet(path: Path) -> Iterable[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("parquet needs pyarrow: pip install 'beft-ext[data]'") from error
    rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _jsonl,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
