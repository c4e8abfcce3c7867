"""Labelled examples: where they come from, and the batches made of them."""

from beft_ext.tasks.batches import Batches, accuracy, predictions
from beft_ext.tasks.data import TASKS, Columns, DataError, Examples, load_task, read_file, subset

__all__ = [
    "TASKS",
    "Batches",
    "Columns",
    "DataError",
    "Examples",
    "accuracy",
    "load_task",
    "predictions",
    "read_file",
    "subset",
]
