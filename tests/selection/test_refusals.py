"""What select and measure_gains cannot work with is said in one sentence; the model stays as it
was."""

from dataclasses import replace

import pytest
import torch
from conftest import batch, tiny, values

from beft_ext import (
    GainError,
    OptimizerError,
    Selection,
    SelectionError,
    find_biases,
    measure_gains,
    select,
)
from beft_ext.training.loss import LossError

METHODS = ["gain", "magnitude"]


def without(*names):
    return [{k: v for k, v in batch(seed=i).items() if k not in names} for i in range(3)]


def refused(kind, message, call, *args, **options):
    """``call`` of a tiny BERT and these raises ``kind`` with ``message``, nothing changed."""
    model = tiny("bert")
    before, required = values(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind, match=message):
        call(model, *args, **options)
    assert all(torch.equal(before[n], t) for n, t in values(model).items())
    assert [p.requires_grad for p in model.parameters()] == required
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_batches_without_labels(method):
    message = "the batches need 'labels'"
    refused(SelectionError, message, select, without("labels"), method)
    refused(LossError, message, measure_gains, without("labels"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([{"text": "no tensor"}], "a batch needs a tensor whose first axis holds the examples"),
        ([[torch.zeros(4, 3)]], "a batch must be a mapping of the model's arguments, .* a list"),
        ([], "the loader is empty|nothing to train on"),
    ],
)
def test_batches_that_are_none(method, loader, message):
    refused(SelectionError, message, select, loader, method)
    refused((SelectionError, LossError), message.partition("|")[0], measure_gains, loader)


@pytest.mark.parametrize("warmup", [2.0, -2.0, float("nan")])
def test_a_warmup_out_of_range(warmup):
    message = f"warmup must be within 0 and 1, but is {warmup}"
    refused(OptimizerError, message, select, without(), "magnitude", warmup=warmup)


@pytest.mark.parametrize("steps", [2.5, float("inf"), float("nan")])
def test_steps_that_are_no_whole_number(steps):
    refused(SelectionError, f"whole numbers, but .* {steps}", select, without(), steps=steps)


def test_bad_steps_are_told_before_the_gains_are_measured():
    refused(SelectionError, "nothing to train on", select, without("labels"), steps=-1)


@pytest.mark.parametrize("call", [select, measure_gains])
def test_biases_of_another_model(call):
    message = "bias '0.query' of 32 elements is of another model, .* no 'distilbert"
    refused(SelectionError, message, call, without(), biases=find_biases(tiny("distilbert")))


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_examples_to_read(count):
    refused(GainError, f"only {count} are to be read", measure_gains, without(), examples=count)


def test_a_selection_of_nothing_can_be_printed_and_has_no_best():
    nothing = Selection("gain", {}, {}, {}, {}, [], [], [], 0, {}, {})
    assert str(nothing) == "no term was scored"
    with pytest.raises(SelectionError, match="no term has a defined 'gain' score: select anew"):
        _ = nothing.best


def test_gains_of_nothing_can_be_printed_and_have_no_best(tmp_path):
    found = select(tiny("bert"), without(), terms="value", steps=2)
    nothing = replace(found.gains, ranking=[], values={}, dead=["value"])
    assert "value" in str(nothing) and str(nothing).endswith("no term is ranked")
    assert not nothing.sure
    with pytest.raises(GainError, match="no term has a gain"):
        _ = nothing.best
    selection = replace(found, gains=nothing, ranking=found.ranking | {"gain": []})
    assert "no term is ranked" in str(selection) and "1. value" in str(selection)
    with pytest.raises(SelectionError, match="choose another method, such as 'beft'"):
        _ = selection.best
    selection.save(tmp_path)
    unranked = replace(found, method="beft", ranking={}, gains=None)
    assert "   - value" in str(unranked)
