"""Reading labelled text: the hub's data sets, local JSON Lines of the same fields, own files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Data that is missing, empty or not as described."""


@dataclass(frozen=True)
class Columns:
    """Names of the fields: one text or a pair, and the label."""

    text: str
    pair: str | None = None
    label: str = "label"


@dataclass(frozen=True)
class Task:
    columns: Columns
    hub: tuple[str, str]
    labels: tuple[str, ...]


TASKS = {
    "sst2": Task(Columns("sentence"), ("nyu-mll/glue", "sst2"), ("negative", "positive")),
    "rte": Task(
        Columns("sentence1", "sentence2"), ("nyu-mll/glue", "rte"), ("entailment", "not_entailment")
    ),
}


@dataclass(frozen=True)
class Examples:
    """Texts, second texts (None for single-text tasks) and labels ``0..C-1``."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


def load_task(name: str, split: str, folder: Path | None = None) -> Examples:
    """One split of a named task, from ``folder/<name>/<split>.jsonl`` or else the hub.

    Raises DataError for an unknown task, a missing file or package, or a hub out of reach.
    """
    if name not in TASKS:
        raise DataError(f"unknown task '{name}': choose one of {', '.join(TASKS)}")
    task = TASKS[name]
    if folder is not None:
        return read_file(folder / name / f"{split}.jsonl", task.columns)
    try:
        import datasets
    except ImportError as error:
        message = "reading the hub needs datasets: pip install 'beft-ext[data]', or give --data DIR"
        raise DataError(message) from error
    try:
        rows = datasets.load_dataset(*task.hub, split=split)
    except Exception as error:  # the hub's client raises many unrelated types
        reason = str(error).splitlines()[0]
        raise DataError(
            f"the hub's '{name}' could not be read ({reason}): give --data DIR"
        ) from error
    return _examples(rows, task.columns, f"the hub's {name}")


def read_file(path: Path, columns: Columns) -> Examples:
    """Examples from a csv, tsv, jsonl or parquet file. Raises DataError."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; use {', '.join(_READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        rows = list(reader(path))
    except (ValueError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from error
    return _examples(rows, columns, str(path))


def subset(examples: Examples, size: int | None, seed: int) -> Examples:
    """``size`` examples drawn without replacement, in a seeded order (the low-data regime)."""
    if size is None:
        return examples
    if not 0 < size <= len(examples):
        raise DataError(f"--train-size {size} must be 1 to {len(examples)}, the number of rows")
    rows = random.Random(seed).sample(range(len(examples)), size)
    pairs = None if examples.pairs is None else [examples.pairs[i] for i in rows]
    return Examples([examples.texts[i] for i in rows], pairs, [examples.labels[i] for i in rows])


def _examples(rows: Iterable[dict[str, Any]], columns: Columns, where: str) -> Examples:
    wanted = [c for c in (columns.text, columns.pair, columns.label) if c]
    texts: list[str] = []
    pairs: list[str] = []
    labels: list[int] = []
    for number, row in enumerate(rows, 1):
        for column in wanted:
            if row.get(column) is None:
                raise DataError(
                    f"{where}, row {number}: no column '{column}'; it has {', '.join(row)}"
                )
        texts.append(str(row[columns.text]))
        pairs.append(str(row[columns.pair]) if columns.pair else "")
        labels.append(_label(row[columns.label], where, number))
    if not texts:
        raise DataError(f"{where}: there are no rows")
    return Examples(texts, pairs if columns.pair else None, labels)


def _label(value: Any, where: str, number: int) -> int:
    try:
        label = int(value)
        if label != float(value) or label < 0:
            raise ValueError
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}, row {number}: label '{value}' is not a class number 0, 1, 2, ..."
        ) from error
    return label


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                yield row


def _separated(delimiter: str) -> Callable[[Path], Iterable[dict[str, Any]]]:
    def read(path: Path) -> Iterable[dict[str, Any]]:
        with path.open(encoding="utf-8", newline="") as lines:
            yield from csv.DictReader(lines, delimiter=delimiter)

    return read


def _parquet(path: Path) -> Iterable[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("parquet needs pyarrow: pip install 'beft-ext[data]'") from error
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


_READERS: dict[str, Callable[[Path], Iterable[dict[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
