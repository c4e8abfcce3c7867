"""A batch in parts is the same step: the loss is divided by what all of it counts."""

import warnings

import pytest
import torch
import transformers as hf
from conftest import BIAS_FREE, CONFIGS, batch, tiny
from torch.nn.functional import cross_entropy

from beft_ext import (
    BiasAdamW,
    Recipe,
    SelectionError,
    TuningError,
    measure_gains,
    prepare,
    select,
    tune,
)
from beft_ext.errors import BeftWarning
from beft_ext.parallel import Ranks
from beft_ext.tasks.rows import DataError
from beft_ext.training.loss import model_loss
from beft_ext.training.parts import parts_of, shortage_of
from beft_ext.training.steps import EagerStep, JoinedStep

UNEVEN = [1, 7, 2, 5, 3, 0, 6]  # labels of each row


def language(rows=7, tokens=9):
    """A batch of texts whose rows have unlike numbers of labels, one of them none."""
    data = batch(rows, tokens)
    labels = data["input_ids"].clone()
    for row, count in enumerate(UNEVEN):
        labels[row, : tokens - count] = -100
    return data | {"labels": labels}


def language_model(name):
    torch.manual_seed(0)
    config = (CONFIGS | BIAS_FREE)[name]()
    return hf.AutoModelForCausalLM.from_config(config).eval()


def each(model, data):
    """The losses of the examples."""
    logits = model(**{k: v for k, v in data.items() if k != "labels"}).logits
    return cross_entropy(logits, data["labels"], reduction="none")


def with_divisor(model, data):
    losses = each(model, data)
    return losses.sum() / 3, 3.0 * len(losses) / len(losses)


def summed(model, data):
    return each(model, data).sum()


def ignored(rows=7):
    data = batch(rows)
    data["labels"][[1, 2]] = -100
    return data


CASES = {
    "classes": lambda: (tiny("bert"), batch(7), model_loss),
    "rows left out": lambda: (tiny("bert"), ignored(), model_loss),
    "tokens": lambda: (language_model("opt"), language(), model_loss),
    "tokens, added": lambda: (language_model("llama"), language(), model_loss),
    "one by one": lambda: (tiny("opt"), batch(7), each),
    "a sum": lambda: (tiny("bert"), batch(7), summed),
    "given with the batch": lambda: (
        language_model("llama"), language() | {"num_items_in_batch": torch.tensor(24)}, model_loss
    ),
}  # fmt: skip


def after_one_step(case, parts, kind=EagerStep):
    model, data, loss = CASES[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BeftWarning)
        prepare(model, "value")
    optimizer = BiasAdamW(model, lr=1e-2)
    more = (Ranks(), parts) if kind is JoinedStep else (parts,)
    value, norm = kind(model, optimizer, loss, False, *more)(data, 1e-2)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(value), float(norm), grads


@pytest.mark.parametrize("kind", [EagerStep, JoinedStep])
@pytest.mark.parametrize("parts", [2, 3, 7, 50])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_whole_batch(case, parts, kind):
    (loss, norm, grads), (want, want_norm, expected) = (
        after_one_step(case, parts, kind), after_one_step(case, 1)
    )  # fmt: skip
    assert loss == pytest.approx(want, rel=1e-5) and norm == pytest.approx(want_norm, rel=1e-5)
    assert grads.keys() == expected.keys() and grads
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6 * want_norm)


def test_parts_are_rows_in_order_and_packed_texts_stay_together():
    data = batch(7) | {"scale": torch.tensor(2.0)}
    parts = parts_of(data, 3)
    assert [len(p["labels"]) for p in parts] == [2, 2, 3]
    assert torch.equal(torch.cat([p["input_ids"] for p in parts]), data["input_ids"])
    assert all(p["scale"] is data["scale"] for p in parts)
    assert len(parts_of(data, 100)) == 7 and parts_of(data, 1) == [data]
    places = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    packed = {"input_ids": places, "labels": places, "position_ids": places}
    assert parts_of(packed, 2) == [packed]


def test_a_selection_in_parts_is_the_same():
    loader = [batch(6, seed=i) for i in range(4)]
    one, other = (select(tiny("llama"), loader, parts=parts) for parts in (1, 4))
    for method, values in one.scores.items():
        for term, value in values.items():
            assert other.scores[method][term] == pytest.approx(value, rel=1e-3, nan_ok=True), method
    gains = [measure_gains(tiny("opt"), loader, parts=parts).values for parts in (1, 5)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-3, abs=1e-5)
    with pytest.raises(SelectionError, match="in 1 part or more, but parts is 0"):
        select(tiny("llama"), loader, parts=0)


class Small:
    """A loss on a device with room for so many rows."""

    def __init__(self, room, wrapped=False):
        self.room, self.wrapped, self.refused = room, wrapped, 0

    def __call__(self, model, data):
        if len(data["labels"]) > self.room:
            self.refused += 1
            error = RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            if self.wrapped:
                raise DataError("cannot read this batch") from error
            raise error
        return model_loss(model, data)


def tuned(loss, folder=None, recipe=None, resume=False, count=3):
    model = tiny("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one was added")
        prepare(model, "value")
    loader = [batch(6, seed=i) for i in range(count)]
    recipe = recipe or Recipe(epochs=2, lr=1e-2)
    run = tune(model, loader, folder=folder, recipe=recipe, loss=loss, resume=resume)
    return [h["loss"] for h in run.history], model


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_that_runs_out_of_memory_is_made_in_parts(wrapped, tmp_path):
    expected, plain = tuned(model_loss)
    small = Small(2, wrapped)
    with pytest.warns(BeftWarning, match="from now on each is read in 4 parts"):
        losses, model = tuned(small, tmp_path)
    assert small.refused == 2 and losses == pytest.approx(expected, rel=1e-5)
    for own, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, want, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_knows_how_many_parts_fit(tmp_path):
    def stopped(record):
        raise KeyboardInterrupt

    model = tiny("llama")
    loader, small = [batch(6, seed=i) for i in range(3)], Small(2)
    recipe = Recipe(epochs=2, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BeftWarning)
        prepare(model, "value")
        with pytest.raises(KeyboardInterrupt):
            tune(model, loader, folder=tmp_path, recipe=recipe, loss=small, save_every=1,
                 report=stopped)  # fmt: skip
    before = small.refused
    tuned(small, tmp_path, recipe, resume=True)
    assert small.refused == before == 2


def test_one_row_that_does_not_fit_is_the_allocators_own_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BeftWarning)
        with pytest.raises(RuntimeError, match="CUDA out of memory"):
            tuned(Small(0))


def test_what_does_not_go_together_is_refused():
    for recipe, why in (
        (Recipe(parts=0), "in 1 part or more, but parts is 0"),
        (Recipe(parts=2, graphs=True), "a graph is of a whole batch"),
    ):
        with pytest.raises(TuningError, match=why):
            tuned(model_loss, recipe=recipe)


@pytest.mark.parametrize("own", [
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
])  # fmt: skip
def test_a_shortage_is_found_below_what_it_was_made_into(own):
    outer = SelectionError("a selection cannot start")
    outer.__cause__ = DataError("cannot read this batch")
    assert shortage_of(outer) is None
    outer.__cause__.__cause__ = own
    assert shortage_of(outer) is own and shortage_of(own) is own


def test_what_is_no_shortage_is_none():
    other = RuntimeError("shapes do not fit")
    other.__cause__ = ValueError("out of memory, says one who does not know")
    assert shortage_of(other) is None and shortage_of(None) is None
    # What another rank said is all that is known of its error.
    told = DataError("rank 1: BertModel cannot read this batch: CUDA out of memory.")
    assert shortage_of(told) is told
