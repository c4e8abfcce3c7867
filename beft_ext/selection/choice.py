"""What ``--terms auto`` trains, and why: the conclusion of docs/selection.md."""

from __future__ import annotations

from beft_ext.selection.result import Selection

SETTLE = 0.05  # accepted risk of the early end of its selection, see settling.py


def automatic(selection: Selection) -> tuple[str, str]:
    """The term and the reason, a sentence.

    The term is the first by the BEFT score. Where the value's score is undefined (its bias was
    added, so it starts at zero) scores cannot be compared. There the term is the value, as in the
    paper's bias-free models.
    """
    if "value" in selection.undefined and "value" not in selection.dead:
        return "value", (
            "its BEFT score is undefined, for its bias starts at zero; of added biases the paper "
            "trains the value's"
        )
    first = selection.best
    values, order = selection.scores["beft"], selection.ranking["beft"]
    reason = f"the first by the BEFT score, {values[first]:.3g}"
    if len(order) > 1:
        reason += f" before {values[order[1]]:.3g} of '{order[1]}'"
    done = len(selection.losses)
    if selection.settled:
        reason += f"; settled after {done} of {selection.steps} steps"
    others = {m: order[0] for m, order in selection.ranking.items() if order and m != "beft"}
    said = ", ".join(f"{method} '{term}'" for method, term in others.items())
    return first, f"{reason} (others say: {said})"
