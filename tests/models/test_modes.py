"""torch's deterministic algorithms, for the time of a selection or a training."""

import os

import pytest
import torch
from conftest import batch, tiny

import beft_ext
from beft_ext.models.modes import repeatable

NAME = "CUBLAS_WORKSPACE_CONFIG"


def state():
    return torch.get_deterministic_debug_mode(), os.environ.get(NAME)


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_all_is_as_it_was_afterwards(monkeypatch, given):
    monkeypatch.delenv(NAME, raising=False)
    if given:
        monkeypatch.setenv(NAME, given)
    before = state()
    with repeatable(False):
        assert state() == before
    with pytest.raises(KeyError), repeatable(True):
        assert state() == (2, given or ":4096:8")
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("wanted", [False, True])
def test_select_and_tune_compute_so_where_asked(tmp_path, wanted):
    seen = set()

    def loss(model, inputs):
        seen.add(torch.are_deterministic_algorithms_enabled())
        return model(**inputs).loss

    model = tiny("bert")
    beft_ext.select(model, [batch()], "beft", loss=loss, deterministic=wanted)
    beft_ext.prepare(model, terms="value")
    recipe = beft_ext.Recipe(epochs=1, deterministic=wanted)
    beft_ext.tune(model, [batch()], lambda _: 0.0, tmp_path, recipe, loss=loss)
    assert seen == {wanted} and not torch.are_deterministic_algorithms_enabled()
