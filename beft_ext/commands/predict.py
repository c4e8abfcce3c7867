"""``beft-ext predict``: rows without labels answered, some at a time, into one whole file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from beft_ext.commands.answering import answering
from beft_ext.commands.loading import ModelSpec, WorkflowError
from beft_ext.commands.sources import Source
from beft_ext.files import whole_file
from beft_ext.progress import Count
from beft_ext.tasks import Answer, DataError, Example, Task, iterate_rows
from beft_ext.tasks.batches import SORTED_BATCHES
from beft_ext.tasks.cells import Row, shown

Record = dict[str, Any]


def run_predict(
    source: Source, spec: ModelSpec, adapter: Path | None, file: Path, out: Path, batch: int = 64
) -> int:
    """Answer the rows of ``file``; ``out`` holds them with what the model says to each.

    The memory that this takes does not grow with the file. ``out`` becomes whole at the end or
    stays as it was.

    Args:
        source: says what the rows mean; its own files are not read.
        adapter: its folder, or None for the model's own head.
        batch: rows that the model reads at once.
    Returns: the number of rows.
    Raises: WorkflowError, DataError or AdapterError.
    """
    write = WRITERS.get(out.suffix.lower())
    if write is None:
        raise WorkflowError(f"--out {out}: the file's name ends in {' or '.join(WRITERS)}")
    if out.exists() and out.samefile(file):
        raise WorkflowError(f"--out {out} is the file that is read: give another name")
    rows = iterate_rows(file)
    rows = chain([next(rows)], rows)  # a file that cannot be read is told before the model loads
    source, model, objective = answering(source, spec, adapter)
    task, done, count = source.task, 0, Count("rows")

    def answers() -> Iterator[Record]:
        nonlocal done
        while part := list(islice(rows, SORTED_BATCHES * batch)):
            asked = task.questions(part, str(file), done + 1)
            found = objective.answered(model, objective.questions(asked, batch))
            for row, example, answer in zip(part, asked, found, strict=True):
                done += 1
                try:
                    yield _joined(row, _record(task, example, answer))
                except DataError as error:
                    raise DataError(f"{file}, row {done}: {error}") from error
            count.add(len(part))
        count.close()

    with (
        whole_file(out) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as opened,
    ):
        write(opened, answers(), names_of(task, objective.model_options.get("num_labels")))
    return done


def names_of(task: Task, outputs: int | None) -> list[str]:
    """What the classes are called: by name, or by number; none where the kind of task has none."""
    if task.kind != "classification":
        return []
    count = len(task.classes) or len(task.options) or outputs or 0
    return list(task.classes) or [str(i) for i in range(count)]


def _record(task: Task, example: Example, answer: Answer) -> Record:
    """The answer in words. Raises DataError for a number that is none."""
    numbers = answer.probabilities or (answer.value,)
    if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
        raise DataError("the model's answer is not a finite number: its training has diverged")
    if not answer.probabilities:
        return {"prediction": answer.value}
    place = int(answer.value)
    if task.kind == "choice":
        said, each = example.options[place], list(answer.probabilities)
        return {"prediction": said, "probability": each[place], "probabilities": each}
    names = names_of(task, len(answer.probabilities))
    named = dict(zip(names, answer.probabilities, strict=True))
    return {"prediction": names[place], "probability": named[names[place]], "probabilities": named}


def _joined(row: Row, record: Record) -> Record:
    if taken := [name for name in record if name in row]:
        raise DataError(f"there is a column '{taken[0]}' already: rename it or leave it out")
    return {**row, **record}


def _jsonl(file: TextIO, records: Iterable[Record], names: Sequence[str]) -> None:
    for record in records:
        file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def _csv(file: TextIO, records: Iterable[Record], names: Sequence[str]) -> None:
    """The rows' columns are those of the first; each class has a column of probabilities."""
    writer: csv.DictWriter[str] | None = None
    for number, record in enumerate(records, 1):
        each = record.pop("probabilities", {})
        if isinstance(each, dict):
            record |= {f"probability_{name}": each[name] for name in names}
        if writer is None:
            writer = csv.DictWriter(file, list(record), lineterminator="\n")
            writer.writeheader()
        if new := record.keys() - set(writer.fieldnames):
            raise DataError(
                f"row {number} has a column '{shown(min(new))}' that the first row lacks: csv has "
                "no place for it, write .jsonl"
            )
        writer.writerow({name: _cell(value) for name, value in record.items()})


def _cell(value: object) -> object:
    return json.dumps(value, default=str) if isinstance(value, (Mapping, list)) else value


# By the suffix of the file that is written.
WRITERS: dict[str, Callable[[TextIO, Iterable[Record], Sequence[str]], None]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
}
