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
    folders = [ROOT / "benchmarks", ROOT / "benchmarks" / "guard"]
    for folder in folders:
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in [p.stem for folder in folders for p in folder.glob("*.py")]:
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


def test_the_guard_names_what_changed_and_by_how_much():
    import guard

    was = {"a": 1000, "b": 1000, "c": 0, "d": 5}
    assert guard.differences(was, {"a": 1030, "b": 970, "c": 0, "d": 5}) == []
    assert guard.differences(was, {"a": 1031, "b": 900, "c": 8, "e": 1}) == [
        "a: 1,000 recorded, 1,031 now, +3.1%",
        "b: 1,000 recorded, 900 now, -10.0%",
        "c: 0 recorded, 8 now",
        "d: gone",
        "e: not recorded yet",
    ]


def test_the_guard_reads_what_ptxas_says():
    import measures

    said = """kernel a:
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
kernel b:
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers
"""
    assert measures.read_report(said, r"^kernel (.+):$", "x") == {
        "x a: registers": 64,
        "x a: spilled bytes": 12,
        "x b: registers": 9,
        "x b: spilled bytes": 0,
    }
    with pytest.raises(RuntimeError, match="ptxas says nothing of a"):
        measures.read_report("kernel a:\n", r"^kernel (.+):$", "x")


def test_the_guard_skips_where_the_compiler_is_another(monkeypatch, capsys):
    import guard

    other = {"versions": staticmethod(lambda: {"g++": "0"}), "counts": None}
    monkeypatch.setattr(guard, "MEASURES", {"instructions": type("Other", (), other)})
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    assert guard.main() == 0
    assert "guard: instructions: skipped, recorded with" in capsys.readouterr().out
