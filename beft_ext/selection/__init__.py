"""Which term to train: one short run, its scores, and the decision; at which rate: a race."""

from beft_ext.selection.auditioning import (
    Contender,
    audition,
    made_by,
    rates_around,
    terms_of,
)
from beft_ext.selection.choice import SETTLE, automatic
from beft_ext.selection.dead import ProbeError, dead_terms
from beft_ext.selection.racers import Audition, AuditionError, Racer, read_audition
from beft_ext.selection.result import Selection, SelectionError, read_selection
from beft_ext.selection.run import ModelSnapshot, Run
from beft_ext.selection.selecting import select

__all__ = [
    "SETTLE",
    "Audition",
    "AuditionError",
    "Contender",
    "ModelSnapshot",
    "ProbeError",
    "Racer",
    "Run",
    "Selection",
    "SelectionError",
    "audition",
    "automatic",
    "dead_terms",
    "made_by",
    "rates_around",
    "read_audition",
    "read_selection",
    "select",
    "terms_of",
]
