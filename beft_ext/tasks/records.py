"""A task as JSON: one of one's own read from a file, and what every result keeps of its task."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from beft_ext.files import JsonObject
from beft_ext.tasks.catalog import TASKS
from beft_ext.tasks.cells import DataError, decoded, parse_json, shown
from beft_ext.tasks.task import Task
from beft_ext.tasks.templates import Column

KEYS = {f.name: f for f in fields(Task) if f.name not in ("reshape", "hub")}
LISTS = ("classes", "metrics", "options")


def read_task(path: Path) -> Task:
    """A task of one's own from a JSON object with Task's fields (but reshape and hub).

    A text or pair ``{"column": NAME}`` is a column of any name. Raises DataError.
    """
    try:
        found = parse_json(decoded(path.read_bytes()))
    except (OSError, DataError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    return _task(found, str(path))


def task_record(task: Task, name: str | None) -> JsonObject:
    """The task's fields, but those that are as they are by default. name: of a named task."""
    found: JsonObject = {} if name is None else {"name": name}
    for key, own in KEYS.items():
        value = getattr(task, key)
        default = own.default if own.default_factory is MISSING else own.default_factory()
        if value == default:
            continue
        if isinstance(value, Column):
            found[key] = {"column": str(value)}
        else:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def task_of(record: object, where: str) -> Task:
    """The task that ``task_record`` made a record of. Raises DataError for any other object."""
    if isinstance(record, dict) and "name" in record:
        name = record["name"]
        if name not in TASKS:
            raise DataError(f"{where}: unknown task '{shown(name)}'")
        return TASKS[name]
    return _task(record, where)


def _task(found: object, where: str) -> Task:
    if not isinstance(found, dict) or "text" not in found:
        raise DataError(f'{where}: a task is an object with at least "text"')
    if wrong := sorted(set(found) - set(KEYS)):
        known = ", ".join(sorted(KEYS))
        raise DataError(f"{where}: unknown key '{shown(wrong[0])}': use {known}")
    values = {name: _value(where, name, value) for name, value in found.items()}
    try:
        return Task(**values)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _value(where: str, name: str, value: Any) -> Any:
    if name in LISTS and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if name in LISTS and not (name == "options" and isinstance(value, str)):
        raise DataError(f"{where}: '{name}' must be a list of texts")
    if name in ("splits", "closed"):
        if not isinstance(value, dict if name == "splits" else bool):
            wanted = "an object" if name == "splits" else "true or false"
            raise DataError(f"{where}: '{name}' must be {wanted}")
        return value
    if name in ("text", "pair") and isinstance(value, dict) and list(value) == ["column"]:
        value = value["column"]
        if isinstance(value, str):
            return Column(value)
    if not isinstance(value, str) and not (name == "pair" and value is None):
        raise DataError(f"{where}: '{name}' must be a text")
    return value
