"""From names and files to tasks and examples, and which rows are for what."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from beft_ext import __version__
from beft_ext.commands.loading import WorkflowError
from beft_ext.files import JsonObject
from beft_ext.tasks import (
    Column,
    DataError,
    Example,
    Task,
    named_task,
    read_task,
    task_record,
    task_rows,
)
from beft_ext.tasks.cells import Row, key, labels
from beft_ext.tasks.rows import Rows
from beft_ext.tasks.streams import Examples

EITHER = "give either --task NAME or --train-file F"


@dataclass(frozen=True)
class Parts:
    """Which rows are for what, where files do not say it.

    Attributes:
        validation: share of the training rows that validate, or None for rows of their own.
        validation_size: number of rows that validate.
        test: share of the training rows that is held back from every choice.
        test_file: rows that no choice sees.
        seed: of what is drawn.
    """

    validation: float | None = None
    validation_size: int | None = None
    test: float | None = None
    test_file: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, share in (("validation", self.validation), ("test", self.test)):
            if share is not None and not 0 < share < 1:
                raise WorkflowError(f"--{name}-split is a share between 0 and 1, not {share}")
        if self.validation_size is not None and self.validation_size < 1:
            raise WorkflowError("--validation-size must be at least 1")
        if self.validation is not None and self.validation_size is not None:
            raise WorkflowError("give --validation-split or --validation-size, not both")
        if self.test is not None and self.test_file is not None:
            raise WorkflowError("give --test-file or --test-split, not both")


@dataclass(frozen=True)
class Source:
    """Where examples come from: a named task (``data``: its folder, else the hub) or files.

    config: a JSON file that describes a task of one's own; else text ('sentence'), pair and label
    ('label') name the columns of the files, and kind says whether labels are classes or numbers
    to be predicted. kept: the task of an adapter, where none of these is said. group, metrics: in
    place of the task's. classes: of the model at hand, where the task names none; an empty list for
    class numbers; None for those that the training rows have.
    """

    name: str | None = None
    data: Path | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    config: Path | None = None
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    kind: str | None = None
    group: str | None = None
    metrics: tuple[str, ...] = ()
    classes: Sequence[str] | None = None
    kept: Task | None = None
    parts: Parts = field(default_factory=Parts)

    @cached_property
    def described(self) -> Task:
        """The task before its rows are looked at. Raises DataError or WorkflowError."""
        if self.name is not None and (self.train_file or self.validation_file):
            raise WorkflowError(EITHER)
        if self.name is not None:
            found = named_task(self.name)
        elif self.config is not None:
            found = read_task(self.config)
        elif self.kept is not None and not self.says_columns:
            found = self.kept
        else:
            pair = None if self.pair is None else Column(self.pair)
            text, kind = Column(self.text or "sentence"), self.kind or "classification"
            found = Task(text=text, pair=pair, label=self.label or "label", kind=kind)
        return replace(
            found, metrics=self.metrics or found.metrics, group=self.group or found.group
        )

    @property
    def says_columns(self) -> bool:
        """Whether anything is said of the files' columns."""
        return any(v is not None for v in (self.text, self.pair, self.label, self.kind))

    def words(self, train: int, validation: int) -> str:
        """Where the rows are from and how many there are, for a reader."""
        whence = f"the task '{self.name}'" if self.train_file is None else self.train_file.name
        return f"{train} training and {validation} validation rows of {whence}."

    @property
    def called(self) -> str | None:
        """The task's name or else the training file's, for a title."""
        return self.name or (None if self.train_file is None else self.train_file.name)

    def record(self) -> JsonObject:
        """The task, the file of rows and the program's version, as every result keeps them."""
        found: JsonObject = {"version": __version__, "task": task_record(self.task, self.name)}
        return found if self.train_file is None else found | {"file": self.train_file.name}

    @cached_property
    def task(self) -> Task:
        """The task with its classes. Raises DataError or WorkflowError."""
        task = self.described
        if not task.open:
            return task
        if self.classes is not None:
            return replace(task, classes=tuple(self.classes))
        rows = self._rows("train")
        columns = None if task.reshape is not None else (task.label,)
        return task.with_classes_in(rows.numbered(columns), rows.where)

    @property
    def has_test(self) -> bool:
        """Whether rows are kept from every choice."""
        return self.parts.test is not None or self.parts.test_file is not None

    def read(self, split: str) -> list[Example]:
        """The examples of 'train', 'validation', 'test' or another split of a named task.

        Raises: DataError or WorkflowError.
        """
        # What rows have in common matters where they are learnt from.
        task = self.task if split == "train" else replace(self.task, group="")
        every, size = Examples(task, self._rows(split)), self.parts.validation_size
        if split != "validation" or split in self._drawn or size is None:
            return list(every)
        if size > len(every):
            where = every.rows.where
            raise WorkflowError(f"--validation-size {size}: {where} has {len(every)} rows")
        return list(every.subset(size, self.parts.seed))

    def training(self) -> list[Example] | Examples:
        """The examples of 'train': a list of them, or a stream of more than are held."""
        if self._rows("train").held is None:
            return Examples(self.task, self._rows("train"))
        return self.read("train")

    def _rows(self, split: str) -> Rows:
        """The rows of a split."""
        if split == "test" and self.parts.test_file is not None:
            return Rows.of(self.parts.test_file)
        if split == "train" or split in self._drawn:
            return self._cut[split]
        return self._whole(split)

    def _whole(self, split: str) -> Rows:
        if self.name is not None:
            return task_rows(self.name, split, self.data)
        file = {"train": self.train_file, "validation": self.validation_file}.get(split)
        if self.train_file is None and self.validation_file is None:
            raise WorkflowError(EITHER)
        if file is None:
            more = ", or --validation-split 0.1" * (split == "validation")
            raise WorkflowError(f"this needs --{split}-file F beside the other file{more}")
        return Rows.of(file)

    @property
    def _drawn(self) -> dict[str, float | int]:
        """The splits that are drawn from the training rows: a share or a number of them."""
        parts, found = self.parts, dict[str, float | int]()
        if parts.test is not None:
            found["test"] = parts.test
        alone = self.name is None and self.validation_file is None
        if parts.validation is not None:
            found["validation"] = parts.validation
        elif alone and parts.validation_size is not None:
            found["validation"] = parts.validation_size
        return found

    @cached_property
    def _cut(self) -> dict[str, Rows]:
        """The training rows, and what is drawn from them, by the split's name."""
        if self.parts.validation is not None and self.validation_file is not None:
            raise WorkflowError("give --validation-file or --validation-split, not both")
        rows, cut = self._whole("train"), dict[str, Rows]()
        whole = len(rows) if self._drawn else 0
        for split, asked in self._drawn.items():
            size = asked if isinstance(asked, int) else max(1, round(asked * whole))
            drawn = drawn_from(rows, size, self.described, self.parts.seed)
            cut[split] = rows.part(drawn, f"{rows.where} (its {split} part)")
            rows = rows.part(drawn, others=True)
        return cut | {"train": rows}


def drawn_from(rows: Rows, size: int, task: Task, seed: int) -> list[int]:
    """Places of ``size`` rows, drawn from each class by its share.

    A row of each class stays. Raises WorkflowError where there are too few.
    """
    chance = random.Random(seed)
    groups: dict[object, list[int]] = {}
    columns = None if task.reshape is not None else (task.label,)
    for i, (_, row) in enumerate(rows.numbered(columns)):
        groups.setdefault(_class(row, task), []).append(i)
    candidates: list[int] = []
    for own in groups.values():
        chance.shuffle(own)
        candidates += own[1:]
    if size > len(candidates):
        raise WorkflowError(
            f"{rows.where}: {size} of {len(rows)} rows cannot be held back, for each class keeps "
            "one to train on: give more rows, or hold back fewer"
        )
    # Evenly over the candidates, which lie class by class.
    return [candidates[(2 * i + 1) * len(candidates) // (2 * size)] for i in range(size)]


def _class(row: Row, task: Task) -> object:
    """What the row is grouped by; None where it says no single class."""
    if task.kind != "classification":
        return None
    try:
        found = labels(task.reshape(row) if task.reshape else row, task.label)
    except DataError:  # told with its row's number when the examples are made
        return None
    return key(found[0]) if len(found) == 1 else None
