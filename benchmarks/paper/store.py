"""The runs of one table: a JSON line each, whole at any moment, added to and replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beft_ext.files import whole_file

RESULTS = Path(__file__).resolve().parents[1] / "results" / "paper"
KEY = ("table", "model", "stand_in", "task", "regime", "method", "seed", "hyper")
SETUP = ("ran", "stand_in", "data", "task", "seed", "hyper")

Record = dict[str, Any]


def read(table: str, folder: Path = RESULTS) -> list[Record]:
    """The records of a table, in the order of writing."""
    path = _path(table, folder)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def add(record: Record, folder: Path = RESULTS) -> None:
    """Write ``record`` in the place of one with the same key, or behind the others."""
    records = read(record["table"], folder)  # anew: another process may have added some
    keys = [_key(r) for r in records]
    if _key(record) in keys:
        records[keys.index(_key(record))] = record
    else:
        records.append(record)
    _write(record["table"], records, folder)


def forget(record: Record, folder: Path = RESULTS) -> None:
    """Remove what has the key of ``record``: it holds no more."""
    records = read(record["table"], folder)
    kept = [r for r in records if _key(r) != _key(record)]
    if len(kept) < len(records):
        _write(record["table"], kept, folder)


def done(record: Record, folder: Path = RESULTS) -> bool:
    """Whether the run that ``record`` begins to describe is there, and not as a failure."""
    records = read(record["table"], folder)
    return any(_key(r) == _key(record) and r["failure"] is None for r in records)


def twin(record: Record, tables: Iterator[str], folder: Path = RESULTS) -> Record | None:
    """The same run in another table: same model, data, task, method, seed, hyperparameters."""
    for table in tables:
        for found in read(table, folder):
            same = all(found.get(k) == record.get(k) for k in SETUP)
            if same and found["model"] == record["model"] and found["metrics"]:
                return found
    return None


def _path(table: str, folder: Path) -> Path:
    return folder / (f"table{table}.jsonl" if table.isdecimal() else f"{table}.jsonl")


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[k] for k in KEY)


def _write(table: str, records: list[Record], folder: Path) -> None:
    with whole_file(_path(table, folder)) as temporary:
        text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records)
        temporary.write_text(text, encoding="utf-8")
