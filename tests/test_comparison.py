"""compare: every method on a tiny encoder and decoder; tables, resuming, failures as results."""

import json

import pytest
import torch
from conftest import tiny

from beft_ext.cli import main
from beft_ext.demo import DATA
from beft_ext.methods import METHODS, kept_bytes, method, trained

FILES = ["--train-file", str(DATA / "train.jsonl")]
FILES += ["--validation-file", str(DATA / "validation.jsonl")]
SHORT = ["--train-size", "16", "--epochs", "1", "--seeds", "2", "--lr", "1e-2"]
QUESTION = {"text": "{sentence}", "prompt": "{sentence} It was", "options": [" terrible", " great"]}


def compare(model, out, methods, *more):
    names = ["--methods", ",".join(methods), "--out", str(out)]
    return main(["compare", "--model", model, *FILES, *SHORT, *names, *more])


def test_every_method_of_an_encoder(tiny_folder, tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    methods = [m for m in METHODS if m not in ("zero-shot", "in-context", "prefix")]
    assert compare(tiny_folder, tmp_path, [*methods, "query+value", "zero-shot"]) == 0
    rows = {r["method"]: r for r in json.loads((tmp_path / "comparison.json").read_text())}
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


def test_every_method_of_a_decoder(tiny_decoder, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    config = tmp_path / "task.json"
    config.write_text(json.dumps(QUESTION))
    methods = [m for m in METHODS if m != "head"]
    assert compare(tiny_decoder, tmp_path, [*methods, "head"], "--task-config", str(config)) == 0
    rows = {r["method"]: r for r in json.loads((tmp_path / "comparison.json").read_text())}
    failed = {name: row["failure"] for name, row in rows.items() if row["failure"]}
    assert list(failed) == ["head"] and "no task head" in failed["head"]


def test_what_is_there_is_not_run_again(tiny_folder, tmp_path, capsys):
    assert compare(tiny_folder, tmp_path, ["value"]) == 0
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert compare(tiny_folder, tmp_path, ["value", "query"]) == 0
    assert (tmp_path / "runs.jsonl").read_text().splitlines()[:2] == lines
    assert compare(tiny_folder, tmp_path, ["value"], "--clip", "2") == 2
    assert "holds another comparison: its clip is 1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        (["valu"], [], "unknown method 'valu'"),
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
