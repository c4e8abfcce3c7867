"""select: every score recomputable from its files, the model untouched, bad runs stopped."""

import json

import numpy as np
import pytest
import torch
from conftest import batch, tiny
from safetensors.numpy import load_file

from beft_ext import SelectionError, Tap, TapError, find_biases, select


def loader(n=5):
    return [batch(seed=i) for i in range(n)]


def state(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        sum(len(m._forward_hooks) for m in model.modules()),
    )


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_every_family_selects_and_comes_back_as_it_was(family):
    model = tiny(family)
    before = state(model)
    selection = select(model, loader(), lr=1e-2)
    assert same(before, state(model))
    assert selection.best not in selection.dead
    alive = family in ("gpt-neox", "qwen2", "deberta-v2")  # rotary or relative positions
    assert ("key" in selection.dead) == (not alive)


def test_scores_recompute_from_the_files(tmp_path):
    selection = select(tiny("bert"), loader(), lr=1e-2)
    selection.save(tmp_path)
    record = json.loads((tmp_path / "selection.json").read_text())
    tensors = load_file(tmp_path / "biases.safetensors")
    for term, want in record["scores"]["beft"].items():
        found = []
        for layer in range(2):
            b0 = tensors[f"initial/{layer}.{term}"].astype(float)
            b = tensors[f"current/{layer}.{term}"].astype(float)
            found.append(1 - b0 @ b / max(b0 @ b0, b @ b))
        assert abs(np.mean(found) - want) < 1e-6
    assert (tmp_path / "heatmap.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "biases.safetensors",
        "heatmap.png",
        "selection.json",
    ]


def test_same_seed_same_bits():
    runs = [select(tiny("bert"), loader(), seed=3) for _ in range(2)]
    assert runs[0].scores == runs[1].scores
    assert all(torch.equal(runs[0].current[n], runs[1].current[n]) for n in runs[0].current)


def test_zero_bias_is_undefined_and_null(tmp_path):
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.bias.zero_()
    selection = select(model, loader())
    assert "layer 1" in selection.undefined["query"]
    assert "query" not in selection.ranking["beft"] and "query" in selection.ranking["magnitude"]
    selection.save(tmp_path)
    text = (tmp_path / "selection.json").read_text()
    assert json.loads(text)["scores"]["beft"]["query"] is None


class Interrupting:
    def __len__(self):
        return 5

    def __iter__(self):
        yield batch()
        yield batch()
        raise KeyboardInterrupt


def test_interrupt_leaves_the_model_as_it_was():
    model = tiny("bert")
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        select(model, Interrupting(), lr=1e-1)
    assert same(before, state(model))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_nothing():
    model = tiny("bert")
    before = state(model)
    with pytest.raises(SelectionError, match="not finite at step"):
        select(model, loader(), steps=30, lr=1e30, clip=1e30)
    assert same(before, state(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "unknown method"),
        ({"terms": ["valu"]}, "no bias in term 'valu'"),
        ({"steps": 0}, "nothing to train"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(SelectionError, match=message):
        select(tiny("bert"), loader(), **options)


def test_empty_loader():
    with pytest.raises(SelectionError, match="empty"):
        select(tiny("bert"), [], steps=3)


def test_a_model_that_is_tapped_already():
    model = tiny("bert")
    with Tap(model, find_biases(model)), pytest.raises(TapError, match="already"):
        select(model, loader())
