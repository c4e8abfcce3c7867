"""``beft-ext tasks``: the named tasks, the fields of one, and its rows as a model reads them."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import islice

from beft_ext.commands.sources import Source
from beft_ext.tasks import TASKS, Example, Task


def listed() -> str:
    """A line for each named task."""
    lines = [f"{'task':<9}{'kind':<16}{'metrics':<22}{'data set':<26}classes"]
    for name, task in TASKS.items():
        place = "/".join(filter(None, task.hub or ()))
        metrics = ", ".join(task.metrics)
        lines.append(
            f"{name:<9}{task.kind:<16}{metrics:<22}{place:<26}{', '.join(task.classes)}".rstrip()
        )
    return "\n".join(lines)


def described(source: Source, rows: int) -> str:
    """The fields of the source's task as JSON, as ``--task-config`` takes them, and ``rows`` of
    its training rows as they are put to a model.

    Raises: DataError or WorkflowError.
    """
    task = source.task if rows else source.described
    names = [f.name for f in fields(Task) if f.name not in ("reshape", "hub", "closed")]
    values = {name: getattr(task, name) for name in names}
    text = json.dumps({k: v for k, v in values.items() if v}, indent=2, ensure_ascii=False)
    if task.reshape is not None:
        text += "\nits rows are reshaped before, which --task-config cannot do"
    parts = [_rendered(task, e) for e in islice(source.training(), rows)] if rows else []
    return "\n\n".join([text, *parts])


def _rendered(task: Task, example: Example) -> str:
    """Each text that a model reads, quoted: so one sees where a space or a line's end is."""
    shown = [("text", example.text), ("pair", example.pair), ("prompt", example.prompt or None)]
    lines = [f"{name:<9}{json.dumps(t, ensure_ascii=False)}" for name, t in shown if t is not None]
    for i, option in enumerate(example.options):
        mark = "  (right)" if i in example.right else ""
        lines.append(f"{'option':<9}{json.dumps(option, ensure_ascii=False)}{mark}")
    if task.kind == "generation":
        lines += [f"{'answer':<9}{json.dumps(a, ensure_ascii=False)}" for a in example.answers]
    elif task.kind == "regression":
        lines.append(f"{'number':<9}{example.label:g}")
    elif task.classes:
        lines.append(f"{'class':<9}{task.classes[int(example.label)]}")
    return "\n".join(lines)
