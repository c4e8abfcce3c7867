"""Loaders without a length in every verb that takes one: they work, or a sentence says how."""

import pytest
import torch
from conftest import batch, tiny
from torch.utils.data import DataLoader, IterableDataset

from beft_ext import Recipe, TuningError, measure_gains, prepare, select, tune
from beft_ext.selection import AuditionError, SelectionError, audition, terms_of

BATCHES = 6


class Rows(IterableDataset):
    """Rows of a stream; with ``own`` in an order that it draws itself."""

    def __init__(self, own=False):
        self.own = torch.Generator().manual_seed(3) if own else None
        self.epochs = []

    def set_epoch(self, number):
        self.epochs.append(number)

    def __iter__(self):
        order = torch.randperm(BATCHES, generator=self.own) if self.own else range(BATCHES)
        for seed in order:
            rows = batch(seed=int(seed))
            yield from ({k: v[i] for k, v in rows.items()} for i in range(4))


def stream(own=False, workers=0):
    return DataLoader(Rows(own), batch_size=4, num_workers=workers)


def listed():
    return [batch(seed=seed) for seed in range(BATCHES)]


class Batched:
    """As a data set of rows gives batches: it can be read again, and has no length."""

    def __iter__(self):
        return iter(listed())


def prepared():
    model = tiny("bert")
    prepare(model, "value")
    return model


def of_rows():
    """torch's loader of rows that are in memory: it draws a seed as that of a stream does."""
    rows = [{k: v[i] for k, v in given.items()} for given in listed() for i in range(4)]
    return DataLoader(rows, batch_size=4)


@pytest.mark.parametrize(
    ("make", "same"),
    [(stream, of_rows), (Batched, listed), (lambda: stream(workers=1), of_rows)],
    ids=["stream", "batches", "workers"],
)
def test_a_selection_is_that_of_a_list(make, same):
    found, expected = (
        select(tiny("bert"), given, terms=["value", "query"], steps=4, lr=1e-2)
        for given in (make(), same())
    )
    assert found.losses == expected.losses
    assert found.gains.values == expected.gains.values
    gains = measure_gains(tiny("bert"), make(), terms=["value", "query"])
    assert gains.values == expected.gains.values
    with pytest.raises(SelectionError, match=r"a loader without a length needs steps=\.\.\."):
        select(tiny("bert"), make(), terms=["value"])


@pytest.mark.parametrize("make", [stream, Batched, lambda: stream(workers=1)])
def test_a_run_is_that_of_a_list(make):
    recipe = Recipe(epochs=2, lr=1e-2)
    found, expected = (
        tune(prepared(), given, given, recipe=recipe, steps=steps).history
        for given, steps in ((make(), BATCHES), (listed(), None))
    )
    assert found == expected and len(found) == 2
    with pytest.raises(TuningError, match=r"tune needs a loader with a length, or steps=\.\.\."):
        tune(prepared(), make())


def test_an_epoch_is_so_many_steps_as_are_asked_for():
    data = stream()
    found = tune(prepared(), data, recipe=Recipe(epochs=3), steps=2)
    assert [record["step"] for record in found.history] == [2, 4, 6]
    assert data.dataset.epochs == [0, 1, 2]
    assert tune(prepared(), listed(), recipe=Recipe(epochs=1), steps=5).step == 5
    with pytest.raises(TuningError, match=r"fewer batches in epoch 1 than steps= says \(7\)"):
        tune(prepared(), stream(), recipe=Recipe(epochs=1), steps=7)
    with pytest.raises(TuningError, match="steps must be at least 1, but is 0"):
        tune(prepared(), stream(), steps=0)


class Killed(Exception):
    pass


@pytest.mark.parametrize("own", [False, True], ids=["in order", "with a generator"])
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, own, stop):
    recipe = Recipe(epochs=2, lr=1e-2)

    def run(folder, loss=None, **options):
        model = prepared()
        more = {} if loss is None else {"loss": loss}
        tune(model, stream(own), None, folder, recipe, steps=4, save_every=1, **more, **options)
        return [p.detach().clone() for p in model.parameters()]

    whole, steps = run(tmp_path / "whole"), iter(range(100))

    def killing(model, given):
        if next(steps) == stop:
            raise Killed
        return model(**given).loss

    with pytest.raises(Killed):
        run(tmp_path / "again", killing)
    assert all(map(torch.equal, whole, run(tmp_path / "again", resume=True)))


def test_another_stream_is_refused_and_so_is_one_that_goes_on_elsewhere(tmp_path):
    recipe = Recipe(epochs=1)
    tune(prepared(), stream(), None, tmp_path, recipe, steps=4)
    with pytest.raises(TuningError, match="belongs to a run on other data"):
        tune(prepared(), listed()[1:], None, tmp_path, recipe, steps=4, resume=True)


def test_batches_that_judge_must_be_there_at_each_epoch():
    with pytest.raises(TuningError, match="evaluate gave no batch: give batches that can be read"):
        tune(prepared(), listed(), iter(listed()), recipe=Recipe(epochs=2))


def test_what_was_read_to_its_end_is_not_read_twice():
    class Once:
        def __init__(self):
            self.left = iter(listed())

        def __iter__(self):
            yield from self.left

    with pytest.raises(SelectionError, match="was read before and can be read once"):
        select(tiny("bert"), Once(), terms=["value"], steps=2)


def test_an_audition_needs_rows_that_can_be_parted():
    model = tiny("bert")
    with pytest.raises(
        AuditionError, match=r"give beft_ext.tasks.Batches, .* and not a DataLoader"
    ):
        audition({"value": terms_of(model, ["value"])}, stream(), [1e-3])
