"""Sets of terms as text: what is written is read again, and picks what it was written for."""

import pytest
from hypothesis import given, settings, strategies as st

from beft_ext import BiasError
from beft_ext.models import TERMS, Bias, Selected, parse_terms, pick, spell

LAYERS = st.integers(0, 99)


def bias(term, layer):
    return Bias(term, layer, f"layers.{layer}.{term}", f"layers.{layer}.{term}.bias", 0, 4)


@st.composite
def entries(draw):
    """A set: of each term either all layers, or ranges with a gap between them."""
    found = []
    for term in draw(st.lists(st.sampled_from(TERMS), min_size=1, unique=True)):
        ends = sorted(draw(st.lists(LAYERS, max_size=6, unique=True)))
        if len(ends) < 2:
            found.append(Selected(term))
        found += [Selected(term, a, b) for a, b in zip(ends[::2], ends[1::2], strict=False)]
    return tuple(draw(st.permutations(found)))


@given(entries())
def test_an_entry_is_read_as_it_was_written(found):
    assert parse_terms("+".join(map(str, found))) == found
    assert parse_terms(map(str, found)) == found


@settings(max_examples=200)
@given(st.data())
def test_what_is_spelled_picks_the_same_biases(data):
    """Models may lack a term in some layers, as those with a few attentions among others do."""
    places = st.tuples(st.sampled_from(TERMS[:4]), st.integers(0, 7))
    biases = [bias(*place) for place in data.draw(st.sets(places, min_size=1))]
    chosen = data.draw(st.sets(st.sampled_from(biases), min_size=1))
    text = "+".join(spell(chosen, biases))
    assert set(pick(biases, text)) == chosen
    assert all(str(entry) in text.split("+") for entry in parse_terms(text))
    whole = {b.term for b in biases} - {b.term for b in set(biases) - chosen}
    assert {t for t in text.split("+") if "@" not in t} == whole


def test_what_texts_mean():
    assert parse_terms("value@6-11+query") == (Selected("value", 6, 11), Selected("query"))
    assert parse_terms(["value@3", "query+key"]) == parse_terms("value@3-3+query+key")
    assert str(Selected("mlp_gate", 3, 3)) == "mlp_gate@3"
    assert parse_terms("value+value") == (Selected("value"),)
    biases = [bias(term, layer) for layer in range(3) for term in ("query", "value")]
    picked = pick(biases, "value@1-2+query@0")
    assert [(b.name, text) for b, text in picked.items()] == [
        ("1.value", "value@1-2"),
        ("2.value", "value@1-2"),
        ("0.query", "query@0"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("valu", "unknown term 'valu': use query, key, value, attention_output, mlp_up, mlp_gate"),
        ("", "unknown term ''"),
        ("value+", "unknown term ''"),
        ("value,query", "unknown term 'value,query'"),
        ("value@", "the layers of 'value@' cannot be read: write value, value@3 or value@6-11"),
        ("value@-1", "cannot be read"),
        ("value@1-", "cannot be read"),
        ("value@1-2-3", "cannot be read"),
        ("value@1@2", "cannot be read"),
        ("value@one", "cannot be read"),
        ("value@\u0663", "cannot be read"),  # a digit, but none of ours
        ("value@9999999", "cannot be read"),
        ("value@11-6", "'value@11-6' ends before it begins: write value@6-11"),
        ("value+value@3", "'value' and 'value@3' share a layer"),
        ("value@3+value", "share a layer"),
        ("value@0-5+query+value@5-6", "'value@0-5' and 'value@5-6' share a layer"),
        ("value@2", "'value@2' is out of range: the model has 2 layers, 0 to 1"),
        ("value@0-2", "the model has 2 layers"),
        ("key", "the model has no term 'key': it has query, value"),
        ("query@1", "'query@1' has none of the layers of 'query', which are 0"),
    ],
)
def test_what_is_no_set_of_terms_of_a_model(text, message):
    biases = [bias("value", 0), bias("value", 1), bias("query", 0)]
    with pytest.raises(BiasError) as caught:
        pick(biases, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_biases_have_no_term():
    with pytest.raises(BiasError, match="no term 'value'"):
        pick([], "value")
