"""Which term to train: gains, one short run, and the decision; at which rate: a race."""

from beft_ext.selection.auditioning import audition
from beft_ext.selection.choice import Choice, automatic, by_prior
from beft_ext.selection.contenders import (
    Contender,
    made_by,
    rate_of_step,
    rates_around,
    terms_of,
)
from beft_ext.selection.dead import ProbeError, dead_terms
from beft_ext.selection.gain_result import GAIN, Gains
from beft_ext.selection.measuring import measure_gains
from beft_ext.selection.racers import (
    Audition,
    AuditionError,
    NoRaceError,
    Racer,
    read_audition,
)
from beft_ext.selection.result import Selection, SelectionError, read_selection
from beft_ext.selection.run import ModelSnapshot, Run
from beft_ext.selection.selecting import select

__all__ = [
    "GAIN",
    "Audition",
    "AuditionError",
    "Choice",
    "Contender",
    "Gains",
    "ModelSnapshot",
    "NoRaceError",
    "ProbeError",
    "Racer",
    "Run",
    "Selection",
    "SelectionError",
    "audition",
    "automatic",
    "by_prior",
    "dead_terms",
    "made_by",
    "measure_gains",
    "rate_of_step",
    "rates_around",
    "read_audition",
    "read_selection",
    "select",
    "terms_of",
]
