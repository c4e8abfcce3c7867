"""What 'auto' trains, and that it says why."""

from conftest import batch, tiny

from beft_ext import select
from beft_ext.selection import automatic


def loader():
    found = [batch(seed=i) for i in range(5)]
    for each in found:
        each["input_ids"][:, 0] = 1
    return found


def test_the_first_by_the_beft_score_with_its_reason():
    selection = select(tiny("bert"), loader(), lr=1e-2)
    term, reason = automatic(selection)
    assert term == selection.ranking["beft"][0]
    assert selection.ranking["beft"][1] in reason and "magnitude" in reason


def test_the_value_where_biases_start_at_zero(bias_free_family):
    selection = select(tiny(bias_free_family), loader(), lr=1e-2)
    term, reason = automatic(selection)
    assert term == "value" and "undefined" in reason


def test_a_settled_selection_says_when():
    selection = select(tiny("bert"), loader(), lr=1e-2)
    ended = type(selection)(**{**vars(selection), "steps": 50})
    assert "settled after 5 of 50 steps" in automatic(ended)[1]
