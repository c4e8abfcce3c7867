"""What a cell of a row says: a text, a number, a class, a list. The same in every kind of file.

csv knows texts alone; JSON and parquet know numbers, booleans, lists and objects too. So a cell
means what its text means: ``1``, ``1.0`` and ``"1"`` are one class, ``true`` and ``"True"`` are
one, and the text of a JSON list is that list.
"""

from __future__ import annotations

import codecs
import datetime
import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from beft_ext.errors import BeftError

Row = dict[str, object]

# Of the columns that are taken where nobody names one: what does.
OPTIONS = {"sentence": "--text-column", "label": "--label-column"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,4})?", re.ASCII | re.IGNORECASE)
BOOLEANS = {"false": Decimal(0), "true": Decimal(1)}
_PLAIN = (bool, int, float, Decimal, datetime.date, datetime.time)
_PYTHONS_LIST = re.compile(r"""\[\s*['"].*['"]\s*,?\s*\]""", re.DOTALL)
_LARGEST = float(np.finfo(np.float32).max)


class DataError(BeftError, ValueError):
    """Data that is missing, empty or not as described."""


def column(row: Mapping[str, object], name: str) -> object:
    """The value of a column; where none has the whole name, dots lead into nested objects.

    Raises:
        DataError: if there is no such column, or no value in it.
    """
    found = _inside(row, name)
    if found is _ABSENT:
        columns = ", ".join(map(shown, list(row)[:20])) + (", ..." if len(row) > 20 else "")
        way = f": {OPTIONS[name]} names another" if name in OPTIONS else ""
        raise DataError(f"no column '{shown(name)}'; it has {columns}{undivided(list(row)) or way}")
    if found is None:
        raise DataError(f"column '{shown(name)}' has no value")
    return found.tolist() if isinstance(found, (np.generic, np.ndarray)) else found


def text(row: Mapping[str, object], name: str) -> str:
    """A column's text. Raises DataError for what is none, such as NaN, bytes or a list."""
    return _text(column(row, name), name)


def number(row: Mapping[str, object], name: str) -> float:
    """A column's number. Raises DataError for what is none, or beyond float32."""
    written = _text(column(row, name), name, "a finite number").strip()
    found = float(written) if _NUMBER.fullmatch(written) else math.nan
    if not abs(found) <= _LARGEST:
        raise DataError(f"column '{shown(name)}' is '{shown(written)}', not a finite number")
    return found


def texts(row: Mapping[str, object], name: str, alone: bool = False) -> tuple[str, ...]:
    """The texts of a column that holds a list, or the text of a JSON list.

    Args:
        alone: a text that is no list is a list of one.
    Raises:
        DataError: if the column holds no list, an empty one, or in it what is no text.
    """
    value = column(row, name)
    found = _list(value)
    if found is None:
        if not alone or (isinstance(value, str) and _PYTHONS_LIST.fullmatch(value.strip())):
            raise DataError(
                f"column '{shown(name)}' holds '{shown(value)}', not a list: write lists as JSON "
                'does, ["a", "b"]'
            )
        found = [value]
    if not found:
        raise DataError(f"column '{shown(name)}' is an empty list")
    return tuple(_text(v, name) for v in found)


def labels(row: Mapping[str, object], name: str) -> list[str]:
    """The class in a column as it is written, or each class of its list."""
    value = column(row, name)
    found = _list(value)
    wanted = "a class number or name"
    return [_text(v, name, wanted) for v in ([value] if found is None else found)]


def key(name: str) -> str | Decimal:
    """What classes are compared by: a number, which true and false are too, or else the text."""
    written = name.strip()
    if _NUMBER.fullmatch(written):
        return Decimal(written)
    return BOOLEANS.get(written.casefold(), name)


def parse_json(written: str) -> Any:
    """The value of a JSON text. Raises DataError, also where an object has a key twice."""
    try:
        return json.loads(written, object_pairs_hook=_object)
    except DataError:
        raise
    except RecursionError as error:
        raise DataError("it is nested too deeply") from error
    except ValueError as error:
        raise DataError(reason(error)) from error


def decoded(data: bytes, line: int = 1) -> str:
    """The text of a file, without a byte order mark, or of a part that begins with ``line``.

    Raises DataError if it is not UTF-8.
    """
    if line == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(f"line {line} is not UTF-8: save the file in this encoding") from error


def distinct(columns: Sequence[str]) -> None:
    """Raises DataError for a name that is there twice. An empty name cannot be asked for."""
    seen: set[str] = set()
    for name in columns:
        if name and name in seen:
            raise DataError(f"column '{shown(name)}' is there twice")
        seen.add(name)


def undivided(columns: Sequence[str]) -> str:
    """What to do about a header that is one cell because another sign stands between the names;
    empty where it is not."""
    signs = {";": "semicolons", "\t": "tabs", ",": "commas"}
    found = next((s for s in signs if len(columns) == 1 and s in columns[0]), "")
    return f": {signs[found]} stand between its columns, so save it anew as csv" if found else ""


def shown(value: object) -> str:
    """A value from a file, fit for one line of a message."""
    written = str(value)
    short = written if len(written) <= 80 else written[:77] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in short)


def reason(error: Exception) -> str:
    """What an error says in one line: ours as it is, another library's by its first line."""
    if isinstance(error, DataError):
        return str(error)
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


_ABSENT = object()


def _inside(value: object, name: str) -> object:
    """The value under ``name`` in an object, or in the text of a JSON object; else _ABSENT."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = parse_json(value)
        except DataError:
            return _ABSENT
    if not isinstance(value, Mapping):
        return _ABSENT
    if name in value:
        return value[name]
    for dot in (i for i, c in enumerate(name) if c == "."):
        if name[:dot] in value:
            found = value[name[:dot]]
            found = None if found is None else _inside(found, name[dot + 1 :])
            if found is not _ABSENT:
                return found
    return _ABSENT


def _text(value: object, name: str, wanted: str = "a text") -> str:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise DataError(f"column '{shown(name)}' holds half a character: '{shown(value)}'")
        return value
    if value is None:
        raise DataError(f"column '{shown(name)}' has an entry without a value")
    if not isinstance(value, _PLAIN):
        raise DataError(f"column '{shown(name)}' holds {_kind(value)}, not {wanted}")
    if isinstance(value, (float, Decimal)) and not math.isfinite(value):
        raise DataError(f"column '{shown(name)}' is '{value}', not {wanted}")
    return str(value)


def _list(value: object) -> Sequence[object] | None:
    """The items of a list, or of the text of a JSON list; else None."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return list(parse_json(value))
        except DataError:
            return None
    return value if isinstance(value, (list, tuple)) else None


def _kind(value: object) -> str:
    kinds: dict[type, str] = {list: "a list", tuple: "a list", dict: "an object", bytes: "bytes"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _object(pairs: list[tuple[str, object]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        distinct([name for name, _ in pairs])
    return made
