"""What the rows of a task mean: texts, prompt, options, label, metric."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property

from beft_ext.tasks.cells import (
    DataError,
    Row,
    key,
    labels,
    number,
    shown,
    text,
    texts,
)
from beft_ext.tasks.classes import MOST_CLASSES, REGRESSION, classes_in
from beft_ext.tasks.examples import Example
from beft_ext.tasks.metrics import METRICS, SUITABLE
from beft_ext.tasks.templates import fill, parse

KINDS = ("classification", "regression", "choice", "generation")


@dataclass(frozen=True)
class Task:
    """A kind of question, and where its parts are in a row. Templates name columns in braces.

    text, pair: templates of what a model with a task head reads.
    label: column of the class, of the choice (or the list of right ones), or of the number to be
        predicted. Classes are named as in ``classes``, or counted from 0 where no number is a
        name; ``1``, ``1.0`` and ``"1"`` are one class, and so are ``true`` and ``"True"``.
    classes: their names, in order. closed: a label is one of the names and never its number;
        so it is where the names are those of training rows (``with_classes_of``).
    prompt: template of what a language model reads. options: one template per class or choice
        of what it may say next, or the name of a column that holds the list.
    answers: column with the text or texts that a generated answer is held against.
    group: column of what rows have in common, such as a passage or a user: rows with the same value
        are left out together where one is to say what was learnt from the others.
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
    closed: bool = False
    prompt: str = ""
    options: tuple[str, ...] | str = ()
    answers: str = ""
    group: str = ""
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
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
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
        for template in self._templates():
            parse(template)
        if len(self._numbers) < len(self.classes):
            raise DataError(f"classes {', '.join(self.classes)}: two of them are the same")
        if "f1" in self.metrics and len(self.classes) > 2:
            raise DataError("metric 'f1' is for two classes: use f1_macro")
        fixed = isinstance(self.options, tuple) and self.options and self.classes
        if fixed and len(self.options) != len(self.classes):
            raise DataError(
                f"there are {len(self.classes)} classes and {len(self.options)} options: give one "
                "option for each class"
            )

    @property
    def open(self) -> bool:
        """Whether nothing says what the classes are but the rows."""
        return self.kind == "classification" and not self.classes and not self.options

    def with_classes_of(self, rows: Iterable[Row], where: str) -> Task:
        """The task with the classes that training rows have, where it is ``open``.

        Raises DataError: ``where`` and what is wrong with the labels (``classes_in``).
        """
        return self.with_classes_in(enumerate(rows, 1), where)

    def with_classes_in(self, numbered: Iterable[tuple[int, Row]], where: str) -> Task:
        """``with_classes_of`` rows with their numbers."""
        if not self.open:
            return self
        if (reshape := self.reshape) is not None:
            numbered = ((number, reshape(row)) for number, row in numbered)
        return replace(self, classes=classes_in(numbered, self.label, where), closed=True)

    @property
    def columns(self) -> Collection[str] | None:
        """Names of what examples are made of; None where rows are reshaped, which may need all."""
        if self.reshape is not None:
            return None
        found = {part for t in self._templates() for named, part in parse(t) if named}
        found.add(self.answers if self.kind == "generation" else self.label)
        found |= {self.group} if self.group else set()
        return found | ({self.options} if isinstance(self.options, str) else set())

    @property
    def wordless(self) -> Task:
        """The task without its texts: its examples are labels alone."""
        options = self.options if isinstance(self.options, str) else ("",) * len(self.options)
        return replace(self, text="", pair=None, prompt="", options=options, group="")

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.metrics[0]

    def examples(self, rows: Iterable[Row], where: str) -> list[Example]:
        """Raises DataError, with ``where`` and the row's number, for what is missing or wrong."""
        return list(self.made(enumerate(rows, 1), where))

    def made(self, numbered: Iterable[tuple[int, Row]], where: str) -> Iterator[Example]:
        """``examples`` of rows with their numbers, one after another."""
        return self._made(self._example, numbered, where)

    def questions(self, rows: Iterable[Row], where: str, first: int = 1) -> list[Example]:
        """``examples`` of rows whose labels are not read, or not there.

        first: the number of the first row in messages.
        """
        return list(self._made(self._question, enumerate(rows, first), where))

    def _made(
        self, make: Callable[[Row], Example], numbered: Iterable[tuple[int, Row]], where: str
    ) -> Iterator[Example]:
        for row_number, row in numbered:
            try:
                yield make(self.reshape(row) if self.reshape else row)
            except DataError as error:
                raise DataError(f"{where}, row {row_number}: {error}") from error

    def _question(self, row: Row) -> Example:
        return Example(*self._words(row))

    def _words(self, row: Row) -> tuple[str, str | None, str, tuple[str, ...]]:
        """Text, pair, prompt and options."""
        if isinstance(self.options, str):
            options = texts(row, self.options)
        else:
            options = tuple(fill(o, row) for o in self.options)
        pair = None if self.pair is None else fill(self.pair, row)
        return fill(self.text, row), pair, fill(self.prompt, row), options

    def _example(self, row: Row) -> Example:
        asked = Example(*self._words(row), group=self._group_of(row))
        if self.kind == "generation":
            return replace(asked, answers=texts(row, self.answers, alone=True))
        if self.kind == "regression":
            return replace(asked, label=number(row, self.label))
        right = self._right(row, len(asked.options) or len(self.classes))
        return replace(asked, label=right[0], right=right)

    def _group_of(self, row: Row) -> str | Decimal | None:
        shared = key(text(row, self.group)) if self.group else ""
        return None if shared == "" else shared

    def _right(self, row: Row, count: int) -> tuple[int, ...]:
        """The class, or the choices that are right. count: how many there are, 0 if unknown."""
        written = row.get(self.label)
        if type(written) is not str:
            return self._judged(row, count)
        # Of many rows most say what an earlier one said.
        if (right := self._known.get((written, count))) is None:
            right = self._judged(row, count)
            if len(self._known) < MOST_CLASSES:
                self._known[written, count] = right
        return right

    def _judged(self, row: Row, count: int) -> tuple[int, ...]:
        column = shown(self.label)
        right = tuple(self._class(key(v)) for v in labels(row, self.label))
        if not right:
            raise DataError(f"column '{column}' lists no class")
        if len(right) > 1 and self.kind == "classification":
            raise DataError(
                f"column '{column}' lists {len(right)} classes, and a classification has one "
                "right class per row: ask for each class by rows of its own"
            )
        if count and max(right) >= count:
            raise DataError(f"label '{max(right)}' is outside the {count} options (0..{count - 1})")
        if twice := [r for r in right if right.count(r) > 1]:
            raise DataError(f"column '{column}' lists option {twice[0]} twice")
        if len(right) > 1 and (others := [m for m in self.metrics if m != "accuracy"]):
            raise DataError(
                f"column '{column}' lists {len(right)} right options, and '{others[0]}' counts "
                "one alone: use accuracy"
            )
        if "f1" in self.metrics and max(right) > 1:
            raise DataError(f"label '{max(right)}': 'f1' is for classes 0 and 1, use f1_macro")
        return right

    def _class(self, asked: str | Decimal) -> int:
        if (place := self._numbers.get(asked)) is not None:
            return place
        named = shown(", ".join(self.classes))
        if self.closed:
            number = isinstance(asked, Decimal)
            raise DataError(
                f"label '{shown(asked)}' is none of the classes of the training rows, {named}"
                + f"; {REGRESSION}" * number
            )
        if any(isinstance(k, Decimal) for k in self._numbers):
            raise DataError(f"label '{shown(asked)}' is none of the classes {named}")
        if isinstance(asked, str) or not 0 <= asked < 2**53 or asked % 1:
            told = f"label '{shown(asked)}' is not a class number 0, 1, 2, ..."
            if self.classes:
                raise DataError(f"{told} nor one of {named}")
            words = "name the task's 'classes', or take the training rows' (Task.with_classes_of)"
            raise DataError(f"{told}: {words if isinstance(asked, str) else REGRESSION}")
        return int(asked)

    @cached_property
    def _numbers(self) -> dict[str | Decimal, int]:
        """Each class's number, by what classes are compared by."""
        return {key(name): i for i, name in enumerate(self.classes)}

    @cached_property
    def _known(self) -> dict[tuple[str, int], tuple[int, ...]]:
        """Which classes or choices are right, by a label's text and the number of options."""
        return {}

    def _templates(self) -> Iterator[str]:
        yield from (t for t in (self.text, self.pair, self.prompt) if t is not None)
        if not isinstance(self.options, str):
            yield from self.options
