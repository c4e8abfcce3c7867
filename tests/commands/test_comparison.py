"""compare: every method on a tiny encoder and decoder; tables, resuming, failures as results."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny

import beft_ext
from beft_ext.commands.cli import main
from beft_ext.commands.comparison import Outcome, add
from beft_ext.commands.demo import DATA
from beft_ext.commands.methods import METHODS, MethodError, kept_bytes, method, trained
from beft_ext.models import find_projections, head_parameters
from beft_ext.tasks import Objective

FILES = ["--train-file", str(DATA / "train.jsonl")]
FILES += ["--validation-file", str(DATA / "validation.jsonl")]
SHORT = ["--train-size", "16", "--epochs", "1", "--seeds", "2", "--lr", "1e-2"]
QUESTION = {"text": "{sentence}", "prompt": "{sentence} It was", "options": [" terrible", " great"]}


def compare(model, out, methods, *more):
    names = ["--methods", ",".join(methods), "--out", str(out)]
    return main(["compare", "--model", model, *FILES, *SHORT, *names, *more])


def read(folder):
    return json.loads((folder / "comparison.json").read_text())


def test_every_method_of_an_encoder(tiny_folder, tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    methods = [m for m in METHODS if m not in ("zero-shot", "in-context", "prefix")]
    assert compare(tiny_folder, tmp_path, [*methods, "query+value", "zero-shot"]) == 0
    rows = {r["method"]: r for r in read(tmp_path)["methods"]}
    failed = {name: row["failure"] for name, row in rows.items() if row["failure"]}
    assert list(failed) == ["zero-shot"] and "use a decoder" in failed["zero-shot"]
    head = 32 * 32 + 32 + 32 * 2 + 2  # BERT's classifier alone: the pooler is of the base model
    assert rows["head"]["parameters"] < head < rows["full"]["parameters"]
    assert rows["query+value"]["parameters"] == rows["head"]["parameters"] + 2 * 2 * 32
    assert rows["random-mask"]["parameters"] == rows["head"]["parameters"] + 2 * 32
    assert rows["peft-beft"]["parameters"] == rows["random-mask"]["parameters"]
    assert rows["auto"]["chosen"] and all(r["peak"] > 0 for r in rows.values() if r["seeds"])
    assert rows["full"]["kept"] > rows["lora"]["kept"] > rows["auto"]["kept"] > 0
    assert "± " in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_says_model_guess_and_the_model_as_it_is(tiny_folder, tmp_path, monkeypatch):
    from beft_ext import plots

    told = []
    monkeypatch.setattr(plots, "methods", lambda *_, **options: told.append(options))
    assert compare(tiny_folder, tmp_path, ["head"]) == 0
    folder = "/".join(Path(tiny_folder).parts[-2:])
    assert told == [{"title": f"{folder}, train.jsonl", "chance": 0.5, "zero_shot": None}]


def test_every_method_of_a_decoder(tiny_decoder, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    config = tmp_path / "task.json"
    config.write_text(json.dumps(QUESTION))
    methods = [m for m in METHODS if m != "head"]
    assert compare(tiny_decoder, tmp_path, [*methods, "head"], "--task-config", str(config)) == 0
    found = read(tmp_path)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    for about in (found, *(run["about"] for run in runs)):  # what was asked, and by which version
        assert about["version"] == beft_ext.__version__
        assert about["task"]["prompt"] == QUESTION["prompt"]
    assert found["model"] == tiny_decoder
    rows = {r["method"]: r for r in found["methods"]}
    failed = {name: row["failure"] for name, row in rows.items() if row["failure"]}
    assert list(failed) == ["head"] and "no task head" in failed["head"]


def test_layers_of_terms_are_methods(tiny_folder, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    methods = ["head", "value@1", "query@0+value", "lora:value@0", "low-rank:value@1", "value@2"]
    assert compare(tiny_folder, tmp_path, methods) == 0
    rows = {r["method"]: r for r in read(tmp_path)["methods"]}
    failed = {name: row["failure"] for name, row in rows.items() if row["failure"]}
    assert list(failed) == ["value@2"] and "the model has 2 layers, 0 to 1" in failed["value@2"]
    head = rows["head"]["parameters"]
    assert rows["value@1"]["parameters"] == head + 32
    assert rows["query@0+value"]["parameters"] == head + 3 * 32
    assert rows["lora:value@0"]["parameters"] == head + 8 * (32 + 32)
    assert rows["low-rank:value@1"]["parameters"] == head + 8 * (4 + 8)


def test_what_is_there_is_not_run_again(tiny_folder, tmp_path, capsys):
    assert compare(tiny_folder, tmp_path, ["value"]) == 0
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert compare(tiny_folder, tmp_path, ["value", "query"]) == 0
    assert (tmp_path / "runs.jsonl").read_text().splitlines()[:2] == lines
    assert compare(tiny_folder, tmp_path, ["value"], "--clip", "2") == 2
    assert "holds another comparison: its clip is 1.0" in capsys.readouterr().err


def test_rates_are_raced_for_each_method_but_those_that_are_given(tiny_folder, tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    more = ["--lr", "auto", "--audition-budget", "6", "--rates", "head=5e-3", "--seeds", "1"]
    more += ["--train-size", "32"]
    methods = ["head", "auto", "value", "all-biases", "lora", "full"]
    assert compare(tiny_folder, tmp_path, methods, *more) == 0
    lines = [json.loads(x) for x in (tmp_path / "runs.jsonl").read_text().splitlines()]
    rates = {x["method"]: x["lr"] for x in lines}
    assert rates["head"] == 5e-3 and rates["full"] in (1e-5, 2e-5, 2e-5 * 3)
    assert not (tmp_path / "head-0" / "audition.json").exists()
    centers = {}
    for name in ("auto", "value", "all-biases", "lora"):
        raced = json.loads((tmp_path / f"{name}-0" / "audition.json").read_text())
        assert raced["rate"] == rates[name]
        centers[name] = raced["rates"][name][1]
    assert centers["lora"] == 5e-4
    assert all(1e-4 <= centers[name] <= 1e-2 for name in ("auto", "value"))
    # What suits the term that needs the smallest steps suits all.
    assert centers["all-biases"] <= min(centers["auto"], centers["value"])
    assert compare(tiny_folder, tmp_path, ["head"], *more[:2], "--train-size", "32") == 2
    assert "its budget is 6.0, here it is 3.0" in capsys.readouterr().err


def test_what_failed_is_tried_again_and_nothing_at_all_is_an_error(
    tiny_folder, tmp_path, capsys, monkeypatch
):
    def failing(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("beft_ext.commands.comparison.tune", failing)
        assert compare(tiny_folder, tmp_path, ["value"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("beft-ext: nothing worked") and "no space left" in error
    assert compare(tiny_folder, tmp_path, ["value"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(x["seed"], x["failure"]) for x in lines] == [(0, None), (1, None)]


def test_two_processes_fill_one_folder(tmp_path):
    setup = {"task": "t"}
    for outcome in (Outcome("a", 0, {"x": 1.0}), Outcome("b", 0, {}, failure="no")):
        found = add(tmp_path / "runs.jsonl", setup, outcome)
    assert [o.method for o in found] == ["a", "b"]
    found = add(tmp_path / "runs.jsonl", setup, Outcome("b", 0, {"x": 2.0}))
    assert [(o.method, o.failure) for o in found] == [("a", None), ("b", None)]


def test_lora_on_one_projection_reaches_that_one_alone():
    pytest.importorskip("peft", reason="peft is not installed")
    model = method("lora:key").setup(tiny("bert"), 0)
    trained_names = {n for n, p in model.named_parameters() if p.requires_grad}
    inside = [n for n in trained_names if "lora" in n]
    assert inside and all(".key." in n for n in inside)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt-neox", "llama"])
def test_a_low_rank_change_of_a_bias_changes_that_slice_alone(family):
    """Oracle: the same change added to the output of the projection by hand."""
    model, ids = tiny(family), torch.arange(3, 10).view(1, 7)
    place = next(p.bias for p in find_projections(model) if p.bias.term == "value")
    projection = model.get_submodule(place.module)
    seen = []
    projection.register_forward_hook(lambda _, __, output: seen.append(output.detach().clone()))
    method("low-rank:value").setup(model, 0)
    projection.register_forward_hook(lambda _, __, output: seen.append(output.detach().clone()))
    model(input_ids=ids)
    assert torch.equal(seen[0], seen[1])  # B is zero at first
    change = projection.low_rank_value
    torch.nn.init.normal_(change.b)
    model(input_ids=ids)
    differing = (seen[3] - seen[2])[0, 0].detach()
    matrix = sum(torch.outer(change.a[r], change.b[:, r]) for r in range(8)) / 8
    assert torch.allclose(place.read(differing.clone()), matrix.flatten(), atol=1e-5)
    assert int((differing != 0).sum()) == place.width
    changes = [p for n, p in model.named_parameters() if "low_rank" in n]
    expected = sum(p.numel() for p in (*changes, *head_parameters(model)))
    assert trained(model) == expected and kept_bytes(model) == 4 * expected


def test_a_variant_has_the_size_that_is_asked_for():
    model = method("random-mask:77").setup(tiny("bert"), 0)
    assert trained(model) == 77 + sum(p.numel() for p in head_parameters(model))
    assert method("in-context:32").shots == 32
    for wrong in ("random-mask:0", "in-context:x", "lora:valu", "low-rank:", "full:1"):
        with pytest.raises(MethodError):
            method(wrong)
    with pytest.raises(MethodError, match="larger than the model"):
        method(f"random-mask:{10**9}").setup(tiny("bert"), 0)


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        (["valu"], [], "unknown method 'valu'"),
        (["value@6-3"], [], "ends before it begins"),
        (["value"], ["--rates", "lora=1"], "'lora', which is not compared"),
        (["value"], ["--rates", "value"], "not METHOD=RATE"),
        (["value"], ["--rates", "value=-1"], "positive"),
        (["value"], ["--seeds", "0"], "--seeds"),
    ],
)
def test_bad_input_is_one_line(tiny_folder, tmp_path, capsys, methods, more, message):
    assert compare(tiny_folder, tmp_path, methods, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


def test_the_random_mask_trains_its_places_alone():
    model = method("random-mask").setup(tiny("bert"), 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.randint(0, 64, (4, 7), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    optimizer.step()
    moved = sum(int((p != before[n]).sum()) for n, p in model.named_parameters())
    assert 0 < moved <= trained(model) and kept_bytes(model) == 8 * trained(model)


def test_a_method_is_evaluated_once_an_epoch(tiny_folder, tmp_path, monkeypatch):
    """And not again at its end, where the best epoch's values are put back."""
    asked, plain = [], Objective.evaluate
    monkeypatch.setattr(Objective, "evaluate", lambda *a: asked.append(1) or plain(*a))
    assert compare(tiny_folder, tmp_path, ["value"], "--epochs", "3") == 0
    assert len(asked) == 2 * 3  # seeds, epochs
