"""Which term to train: one short run, its scores, and the decision."""

from beft_ext.selection.choice import SETTLE, automatic
from beft_ext.selection.dead import ProbeError, dead_terms
from beft_ext.selection.result import Selection, SelectionError, read_selection
from beft_ext.selection.run import ModelSnapshot, Run
from beft_ext.selection.selecting import select

__all__ = [
    "SETTLE",
    "ModelSnapshot",
    "ProbeError",
    "Run",
    "Selection",
    "SelectionError",
    "automatic",
    "dead_terms",
    "read_selection",
    "select",
]
