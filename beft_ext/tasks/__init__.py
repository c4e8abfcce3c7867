"""Labelled examples: where they come from, how a model is asked, and how its answers count."""

from beft_ext.tasks.batches import Batches
from beft_ext.tasks.catalog import TASKS, load_task, named_task, task_rows
from beft_ext.tasks.cells import DataError
from beft_ext.tasks.examples import Example, subset
from beft_ext.tasks.heads import HeadObjective
from beft_ext.tasks.objective import Answer, Objective
from beft_ext.tasks.prompts import PromptObjective
from beft_ext.tasks.records import read_task, task_of, task_record
from beft_ext.tasks.rows import iterate_rows, read_rows
from beft_ext.tasks.task import Task
from beft_ext.tasks.templates import Column

__all__ = [
    "TASKS",
    "Answer",
    "Batches",
    "Column",
    "DataError",
    "Example",
    "HeadObjective",
    "Objective",
    "PromptObjective",
    "Task",
    "iterate_rows",
    "load_task",
    "named_task",
    "read_rows",
    "read_task",
    "subset",
    "task_of",
    "task_record",
    "task_rows",
]
