"""What the rows of a task mean: texts, prompt, options, label, metric."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from beft_ext.tasks.examples import Example
from beft_ext.tasks.metrics import METRICS, SUITABLE
from beft_ext.tasks.rows import DataError, Row

KINDS = ("classification", "regression", "choice", "generation")


@dataclass(frozen=True)
class Task:
    """A kind of question, and where its parts are in a row. Templates name columns in braces.

    text, pair: templates of what a model with a task head reads.
    label: column of the class (a number from 0, or one of ``classes``), of the choice (or list
        of right ones) or of the number to be predicted.
    prompt: template of what a language model reads. options: one template per class or choice
        of what it may say next, or the name of a column that holds the list.
    answers: column with the text or texts that a generated answer is held against.
    metrics: the first one decides; by default the kind's usual one.
    learn: a language model learns to rank the 'options', or by teacher forcing to say the right
        one ('answer').
    hub: path and name of a data set; splits: its own names of 'validation' and so on.
    reshape: adds columns to a row.
    """

    text: str
    pair: str | None = None
    label: str = "label"
    kind: str = "classification"
    classes: tuple[str, ...] = ()
    prompt: str = ""
    options: tuple[str, ...] | str = ()
    answers: str = ""
    metrics: tuple[str, ...] = ()
    learn: str = "options"
    hub: tuple[str, str | None] | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    reshape: Callable[[Row], Row] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"unknown kind of task '{self.kind}': use {', '.join(KINDS)}")
        suitable = SUITABLE[self.kind]
        # Past the dataclass's own refusal: it is frozen.
        object.__setattr__(self, "metrics", self.metrics or suitable[:1])
        if wrong := [m for m in self.metrics if m not in METRICS]:
            raise DataError(f"unknown metric '{wrong[0]}': use {', '.join(METRICS)}")
        if wrong := [m for m in self.metrics if m not in suitable]:
            raise DataError(
                f"metric '{wrong[0]}' does not suit a {self.kind} task: use {', '.join(suitable)}"
            )
        if self.learn not in ("options", "answer"):
            raise DataError(f"learn must be 'options' or 'answer', not '{self.learn}'")
        missing = {"choice": "options", "generation": "answers"}.get(self.kind)
        if missing and not getattr(self, missing):
            raise DataError(f"a {self.kind} task needs '{missing}'")

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.metrics[0]

    def examples(self, rows: Iterable[Row], where: str) -> list[Example]:
        """Raises DataError, with ``where`` and the row's number, for what is missing or wrong."""
        made = []
        for number, row in enumerate(rows, 1):
            try:
                made.append(self._example(self.reshape(row) if self.reshape else row))
            except KeyError as error:
                raise DataError(
                    f"{where}, row {number}: no column '{error.args[0]}'; it has {', '.join(row)}"
                ) from error
            except (DataError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise DataError(f"{where}, row {number}: {error}") from error
        return made

    def _example(self, row: Row) -> Example:
        def text(template: str) -> str:
            try:
                return template.format_map(_Present(row))
            except DataError:
                raise
            except (ValueError, AttributeError, TypeError, IndexError) as error:
                raise DataError(f"template '{template}': {error}") from error

        if isinstance(self.options, str):
            options = tuple(str(o) for o in _column(row, self.options))
        else:
            options = tuple(text(o) for o in self.options)
        right: tuple[int, ...] = ()
        answers: tuple[str, ...] = ()
        label = 0.0
        if self.kind == "generation":
            answers = _texts(_column(row, self.answers))
        elif self.kind == "regression":
            label = float(_column(row, self.label))
        else:
            value = _column(row, self.label)
            right = tuple(self._class(v) for v in (value if _listed(value) else [value]))
            count = len(options) or len(self.classes)
            if not right or (count and max(right) >= count):
                raise DataError(f"label '{value}' is outside the {count} options (0..{count - 1})")
            label = right[0]
        pair = None if self.pair is None else text(self.pair)
        return Example(text(self.text), pair, text(self.prompt), options, label, right, answers)

    def _class(self, value: Any) -> int:
        if value in self.classes:
            return self.classes.index(value)
        try:
            label = int(value)
            if label != float(value) or label < 0:
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            known = f" nor one of {', '.join(self.classes)}" if self.classes else ""
            raise DataError(f"label '{value}' is not a class number 0, 1, 2, ...{known}") from error
        return label


def read_task(path: Path) -> Task:
    """A task of one's own from a JSON object with Task's fields (but reshape). Raises DataError."""
    known = {f.name for f in fields(Task)} - {"reshape", "hub"}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict) or "text" not in found:
        raise DataError(f'{path}: a task is an object with at least "text"')
    if wrong := sorted(set(found) - known):
        raise DataError(f"{path}: unknown key '{wrong[0]}': use {', '.join(sorted(known))}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    for name, value in values.items():
        _check_type(path, name, value)
    try:
        return Task(**values)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _check_type(path: Path, name: str, value: Any) -> None:
    listed = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    if name in ("classes", "metrics", "options"):
        if not listed and not (name == "options" and isinstance(value, str)):
            raise DataError(f"{path}: '{name}' must be a list of texts")
    elif name == "splits":
        if not isinstance(value, dict):
            raise DataError(f"{path}: 'splits' must be an object")
    elif not isinstance(value, str) and not (name == "pair" and value is None):
        raise DataError(f"{path}: '{name}' must be a text")


class _Present(dict[str, Any]):
    """A row for ``format_map``. None is no text: csv gives it for what a short line lacks."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is None:
            raise DataError(f"column '{key}' has no value")
        return value


def _column(row: Row, path: str) -> Any:
    """The value at ``path``; dots lead into nested objects (SQuAD's ``answers.text``)."""
    value: Any = row
    for part in path.split("."):
        value = value[part]
        if value is None:
            raise DataError(f"column '{path}' has no value")
    return value


def _listed(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _texts(value: Any) -> tuple[str, ...]:
    found = tuple(str(v) for v in (value if _listed(value) else [value]))
    if not found:
        raise DataError("there is no answer")
    return found
