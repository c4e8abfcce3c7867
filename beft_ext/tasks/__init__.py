"""Labelled examples: where they come from, how a model is asked, and how its answers count."""

from beft_ext.tasks.batches import Batches
from beft_ext.tasks.catalog import TASKS, load_task, named_task
from beft_ext.tasks.cells import DataError
from beft_ext.tasks.examples import Example, subset
from beft_ext.tasks.heads import HeadObjective
from beft_ext.tasks.objective import Objective
from beft_ext.tasks.prompts import PromptObjective
from beft_ext.tasks.rows import read_rows
from beft_ext.tasks.task import Task, read_task
from beft_ext.tasks.templates import Column

__all__ = [
    "TASKS",
    "Batches",
    "Column",
    "DataError",
    "Example",
    "HeadObjective",
    "Objective",
    "PromptObjective",
    "Task",
    "load_task",
    "named_task",
    "read_rows",
    "read_task",
    "subset",
]
