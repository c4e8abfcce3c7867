"""What 'auto' trains, how sure it is, and that it says why."""

from dataclasses import replace
from statistics import NormalDist

import pytest
from hypothesis import given, strategies as st

from beft_ext.selection import Gains, automatic
from beft_ext.selection.choice import PRIORS, Prior, by_prior, weighed
from beft_ext.selection.gain_result import MARGIN, SURE


def gains(error, **values):
    """Of 100 examples; ``error``: of each gain and of the first's lead over each other."""
    ranking = sorted(values, key=lambda t: -values[t])
    return Gains(
        ranking=ranking,
        values={t: values[t] for t in ranking},
        errors=dict.fromkeys(ranking, error),
        chance=dict.fromkeys(ranking, 0.005),
        leads={t: (values[ranking[0]] - values[t], error) for t in ranking[1:]},
        bands={t: {} for t in ranking},
        steps=dict.fromkeys(ranking, 1.0),
        elements=dict.fromkeys(ranking, 32),
        curve={},
        head=None,
        frontier=[],
        dead=[],
        examples=100,
        folded=False,
    )


@pytest.mark.parametrize("family", [*PRIORS, "a family that nobody studied"])
def test_a_clear_lead_wins_in_any_family(family):
    choice = automatic(gains(0.002, query=0.4, value=0.1, mlp_up=0.1), family)
    assert choice.term == "query" and choice.sure and choice.confidence > 0.99
    assert "'query'" not in choice.reason  # nothing speaks for another
    assert "0.400 ± 0.002" in choice.reason and "100 examples; sure" in choice.reason


def test_noise_goes_to_the_term_that_the_prior_names():
    noisy = gains(0.5, query=0.06, value=0.01, mlp_up=0.02)
    choice = automatic(noisy, "encoder")
    assert choice.term == "mlp_up"
    assert "0.020 ± 0.500" in choice.reason and "'query' 0.060 ± 0.500" in choice.reason
    assert PRIORS["encoder"].evidence in choice.reason and "'mlp_up'" in choice.reason


def test_an_unknown_family_has_the_widest_prior():
    noisy = gains(0.5, query=0.06, value=0.01, mlp_up=0.02)
    widest = max(PRIORS.values(), key=lambda prior: prior.spread)
    assert automatic(noisy, "nobody's") == weighed(noisy, widest)


def test_layers_of_a_term_share_its_prior():
    noisy = {"value": 0.06, "mlp_up@0-1": 0.02}
    assert automatic(gains(0.5, **noisy), "encoder").term == "mlp_up@0-1"


def test_without_data_the_prior_is_what_is_told():
    """A rival's surplus is normal around the difference of the means, with twice the variance."""
    prior = Prior({"a": 0.05}, spread=0.03, evidence="nothing")
    choice = weighed(gains(1e6, a=0.0, b=0.0), prior)
    want = NormalDist(0.05, 2**0.5 * 0.03).cdf(-MARGIN)
    assert choice.term == "a" and choice.confidence == pytest.approx(1 - want, rel=1e-6)


def test_without_a_prior_the_paired_error_is_what_is_told():
    prior = Prior({}, spread=1e6, evidence="nothing")
    choice = weighed(gains(0.07, a=0.2, b=0.1), prior)
    want = NormalDist(0.2 - 0.1, 0.07).cdf(-MARGIN)
    assert choice.term == "a" and choice.confidence == pytest.approx(1 - want, rel=1e-6)


def test_what_all_terms_gain_alike_says_nothing():
    def told(more):
        found = gains(0.05, a=more + 0.03, b=more + 0.02, c=more)
        leads = {"b": (0.01, 0.01), "c": (0.03, 0.2)}
        return weighed(replace(found, leads=leads), PRIORS["encoder"])

    assert told(0.5).term == told(0.0).term
    assert told(0.5).confidence == pytest.approx(told(0.0).confidence, rel=1e-9)


@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.floats(-1, 1), min_size=1),
    st.floats(0, 10),
    st.floats(0.01, 10),
)
def test_confidence_is_a_probability(values, error, spread):
    choice = weighed(gains(error, **values), Prior({"a": 0.1}, spread, "nothing"))
    assert choice.term in values and 0 <= choice.confidence <= 1
    assert choice.sure == (choice.confidence >= SURE)


TIED = {"mlp_down": 0.33, "value": 0.32, "query": 0.1}


@pytest.mark.parametrize(
    ("error", "sizes", "merging", "term"),
    [
        (0.05, {"mlp_down": 4, "value": 4}, ["mlp_down", "value"], "mlp_down"),  # the larger gain
        (0.05, {"mlp_down": 4, "value": 4}, ["value"], "value"),
        (0.05, {"mlp_down": 9, "value": 4}, ["mlp_down", "value"], "value"),
        (0.05, {"mlp_down": 4, "value": 9}, ["value"], "value"),
        (0.05, {"mlp_down": 9, "value": 4}, ["mlp_down"], "mlp_down"),
        (0.002, {"mlp_down": 9, "value": 4}, ["value"], "mlp_down"),  # no tie
    ],
)
def test_a_tie_goes_to_what_merges_and_then_to_the_smaller(error, sizes, merging, term):
    tied = replace(gains(error, **TIED), elements={"query": 1} | sizes)
    choice = weighed(tied, Prior({}, 1e6, "nothing"), merging)
    assert choice.term == term
    if term == "value":
        why = "is smaller" if "mlp_down" in merging else "merges"
        assert "that of 'mlp_down' 0.330 is no larger for certain" in choice.reason
        assert f"and 'value' {why} (" in choice.reason


def test_a_lead_beyond_the_margin_is_no_tie_however_large_the_error():
    wide = replace(gains(5.0, a=0.2 + 1.01 * MARGIN, b=0.2), elements={"a": 9, "b": 1})
    assert weighed(wide, Prior({}, 1e6, "nothing"), ["b"]).term == "a"


def test_a_term_without_a_rival_is_sure():
    choice = automatic(gains(0.1, value=0.3), "encoder")
    assert (choice.term, choice.confidence) == ("value", 1.0)


@pytest.mark.parametrize(
    ("family", "terms", "term"),
    [
        ("encoder", ["value", "mlp_up"], "mlp_up"),
        ("other", ["query", "value"], "value"),
        ("unheard of", ["key"], "key"),
    ],
)
def test_where_the_data_tell_nothing_the_prior_does(family, terms, term):
    choice = by_prior(terms, family, "all labels are the same")
    assert choice.term == term and not choice.sure
    assert "all labels are the same" in choice.reason
