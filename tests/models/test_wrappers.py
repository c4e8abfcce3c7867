"""A wrapper is not another model: the model inside, what is refused, and what lies on a model."""

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import tiny
from torch import nn

from beft_ext.errors import BeftError
from beft_ext.models import state, unsharded
from beft_ext.models.wrappers import called, class_of, inside, whole


class Refused(BeftError):
    """As each room has its own."""


WRAPS = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "both": lambda m: nn.DataParallel(torch.compile(m)),
    "both, the other way": lambda m: torch.compile(nn.DataParallel(m)),
}


@pytest.mark.parametrize("name", WRAPS)
def test_the_model_inside_is_found_and_carries_the_records(name):
    model = nn.Linear(3, 2)
    wrapped = WRAPS[name](model)
    assert inside(wrapped) is inside(model) is whole(wrapped, Refused) is model
    state.put(wrapped, Note("a"))
    assert state.get(model, Note) == Note("a")


@pytest.mark.parametrize("held", ["auto_model", "model"])
def test_sentence_transformers_hold_the_model_in_their_first_module(held):
    """Told by package and attribute; its own call is another, so the model inside is called."""
    own = {"__module__": "sentence_transformers.models"}
    first = type("Transformer", (nn.Module,), own)()
    setattr(first, held, model := nn.Linear(3, 2))
    wrapper = type("SentenceTransformer", (nn.Sequential,), own)(first, nn.Flatten())
    for outer in (wrapper, first, nn.DataParallel(wrapper)):
        assert inside(outer) is whole(outer, Refused) is model
    assert called(wrapper) is called(first) is called(model) is model
    assert called(torch.compile(model)) is not model
    empty = type("SentenceTransformer", (nn.Sequential,), own)(nn.Flatten())
    assert inside(empty) is called(empty) is empty


def test_data_parallel_will_not_do_where_copies_run():
    model = nn.Linear(3, 2)
    assert whole(torch.compile(model), Refused, copies=False) is model
    for wrapped in (nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        with pytest.raises(Refused, match="DataParallel, which runs copies of it: pass the plain"):
            whole(wrapped, Refused, copies=False)


def test_what_peft_wrapped_will_do_only_where_names_do_not_matter():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    wrapped = peft.get_peft_model(tiny("bert"), peft.BeftConfig(target_modules=["value"]))
    assert whole(wrapped, Refused, adapted=True) is wrapped
    with pytest.raises(Refused, match="wrapped by PEFT"):
        whole(wrapped, Refused)
    with pytest.raises(Refused, match="wrapped by PEFT"):
        whole(torch.compile(wrapped), Refused)


def test_a_package_is_told_by_whole_names():
    """A class of ``petfood`` is none of PEFT's, and one of ``peft.tuners`` is."""
    for package, taken in (("peft.tuners", True), ("petfood", False), ("own.peft", False)):
        kind = type("Own", (nn.Linear,), {"__module__": package})
        model = type("Derived", (kind,), {})(3, 2)
        if taken:
            with pytest.raises(Refused, match="PEFT"):
                whole(model, Refused)
        else:
            assert whole(model, Refused) is model


def test_what_is_not_here_as_a_whole_is_refused():
    offloaded = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(
        Refused, match=r"parameter '1.weight' is on the meta device, and no offload holds"
    ):
        whole(torch.compile(offloaded), Refused)
    partitioned = nn.Linear(3, 2)
    partitioned.bias.ds_status = "NOT_AVAILABLE"  # as DeepSpeed marks what lies elsewhere
    with pytest.raises(Refused, match=r"parameter 'bias' is partitioned by DeepSpeed"):
        whole(partitioned, Refused)
    split = nn.Linear(3, 2)
    for size, refused in ((None, False), (1, False), (2, True)):
        split._tp_size = size
        if refused:
            with pytest.raises(Refused, match="split by tensor parallelism"):
                whole(split, Refused)
        else:
            assert whole(split, Refused) is split


def test_fsdp1_is_refused_by_its_name_wherever_it_wraps():
    kind = type("FullyShardedDataParallel", (nn.Sequential,), {})
    for model in (kind(nn.Linear(3, 2)), nn.Sequential(kind(nn.Linear(3, 2)))):
        with pytest.raises(Refused, match=r"FullyShardedDataParallel \(FSDP1; fully_shard will do"):
            whole(model, Refused)


def test_what_stays_whole_are_the_vectors_and_the_head():
    model = tiny("bert")
    kept = unsharded(model)
    assert {n for n, p in model.named_parameters() if p in kept and p.ndim > 1} == {
        "classifier.weight"
    }
    assert all(p.ndim > 1 for p in model.parameters() if p not in kept)
    assert class_of(model) is type(model)


@dataclass
class Note(state.Record):
    text: str


@dataclass
class Claim(state.Record):
    def claim(self):
        return "not now"


def test_records_are_one_of_a_kind_and_leave_nothing_behind():
    model = nn.Linear(3, 2)
    before = dict(model.__dict__)
    assert state.get(model, Note) is None and state.take(model, Note) is None
    state.put(model, Note("a"))
    state.put(model, Claim())
    state.put(model, Note("b"))
    assert state.get(model, Note) == Note("b") and state.claims(model) == ["not now"]
    assert "beft" not in str(list(model.state_dict()))
    other = copy.deepcopy(model)
    assert state.take(other, Note) == Note("b") and state.get(other, Note) is None
    assert state.get(other, Claim) is not None and state.get(model, Note) == Note("b")
    assert state.take(other, Claim) is not None and dict(other.__dict__).keys() == before.keys()
    state.clear(model)
    assert dict(model.__dict__) == before
