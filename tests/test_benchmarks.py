"""The benchmarks' baselines compute what ours computes, and the README shows what files hold."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import batch, tiny

from beft_ext import Tap, find_biases
from beft_ext.ops import bias_grad_stats

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("harness", "peers", "render"):
        sys.modules.pop(name, None)


def test_the_readmes_tables_are_those_of_the_results():
    import render

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == render.rendered(readme, render.tables())


def test_the_eager_operator_is_the_same():
    import peers

    dy = torch.randn(3, 5, 7)
    a, b = [torch.zeros(7) for _ in range(2)], [torch.zeros(7) for _ in range(2)]
    torch.testing.assert_close(peers.eager_stats(dy, *a), bias_grad_stats(dy, *b))
    torch.testing.assert_close(a, b)


def test_the_peers_squares_are_the_taps():
    import peers

    model, inputs = tiny("bert"), batch()
    del inputs["attention_mask"]  # vmap cannot follow transformers' look at the mask
    biases = find_biases(model)
    with Tap(model, biases) as tap:
        tap.step(4, scale=4.0)
        model(**inputs).loss.backward()
        want = tap.statistics()
    model.requires_grad_(False)
    own = {b.parameter: model.get_parameter(b.parameter).requires_grad_() for b in biases}
    for method in (peers.batch_of_one, peers.vmap_grad):
        found = method(model, own, inputs)
        for bias in biases:
            torch.testing.assert_close(found[bias.parameter], want[bias][1], rtol=1e-3, atol=1e-9)
