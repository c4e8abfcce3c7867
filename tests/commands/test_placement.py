"""--dtype, --device-map, --max-memory, --gradient-accumulation and --gradient-checkpointing."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from beft_ext.commands.cli import main
from beft_ext.commands.demo import DATA
from beft_ext.commands.loading import ModelSpec
from beft_ext.commands.placement import Placement, PlacementError
from beft_ext.models.offload import is_offloaded
from beft_ext.tasks import Task

FILES = ["--train-file", str(DATA / "train.jsonl")]
FILES += ["--validation-file", str(DATA / "validation.jsonl")]
SHORT = ["--train-size", "48", "--epochs", "1", "--lr", "1e-2", "--terms", "value"]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def halved(tiny_folder):
    """Room for the largest part of the model and little more."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(tiny_folder)
    sizes = [sum(4 * p.numel() for p in m.parameters()) for m in model.base_model.encoder.layer]
    sizes.append(sum(4 * p.numel() for p in model.base_model.embeddings.parameters()))
    return ["--device-map", "sequential", "--max-memory", f"cpu={2 * max(sizes) // 1000}KB"]


def tune(folder, out, *more):
    assert main(["tune", "--model", str(folder), *FILES, *SHORT, *more, "--out", str(out)]) == 0
    return load_file(out / WEIGHTS)


@pytest.fixture(scope="module")
def usual(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("usual")
    tune(tiny_folder, out)
    return out


def test_an_offloaded_model_is_selected_on_tuned_and_merged(tiny_folder, halved, usual, tmp_path):
    arguments = dict(zip(("device_map", "max_memory"), halved[1::2], strict=True))
    spec = ModelSpec(tiny_folder, placement=Placement(**arguments))
    model, _ = spec.load(Task("sentence"))
    assert is_offloaded(model)
    assert not any(p.is_meta for n, p in model.named_parameters() if "classifier" in n)
    tune(tiny_folder, tmp_path / "tuned", *halved)
    assert (tmp_path / "tuned" / WEIGHTS).read_bytes() == (usual / WEIGHTS).read_bytes()
    found = []
    for more, name in ((halved, "one"), ([], "other")):
        out = tmp_path / name
        select = ["select", "--model", tiny_folder, *FILES, "--train-size", "32", *more]
        assert main([*select, "--out", str(out / "selection")]) == 0
        adapter = ["--adapter", str(usual / "adapter")]
        merged = str(out / "merged")
        assert main(["merge", "--model", tiny_folder, *adapter, *more, "--out", merged]) == 0
        evaluate = ["evaluate", "--model", tiny_folder, *adapter, *FILES, *more]
        assert main([*evaluate, "--out", str(out)]) == 0
        record = json.loads((out / "evaluation.json").read_text())
        selection = json.loads((out / "selection" / "selection.json").read_text())
        plain = hf.AutoModelForSequenceClassification.from_pretrained(merged)
        found.append((record["predictions"], selection["scores"], plain.state_dict()))
    (*one, weights), (*other, expected) = found
    assert one == other and all(torch.equal(weights[n], expected[n]) for n in expected)


def test_parts_of_a_step_change_nothing_but_rounding(tiny_folder, usual, tmp_path):
    want = load_file(usual / WEIGHTS)
    found = tune(tiny_folder, tmp_path / "parts", "--gradient-accumulation", "4")
    # Dropout draws other numbers: the same steps, not the same bits.
    assert found.keys() == want.keys()
    again = tune(tiny_folder, tmp_path / "kept", "--gradient-checkpointing")
    assert all(torch.equal(again[n], want[n]) for n in want)


@pytest.mark.parametrize("verb", ["tune", "compare"])
def test_no_pass_of_a_race_reads_more_rows_than_a_part_has(
    tiny_folder, tmp_path, monkeypatch, verb
):
    forward, rows = hf.BertForSequenceClassification.forward, []

    def seen(self, input_ids=None, **kwargs):
        if torch.is_grad_enabled():
            rows.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(hf.BertForSequenceClassification, "forward", seen)
    own = ["--terms", "value"] if verb == "tune" else ["--methods", "value", "--seeds", "1"]
    own += ["--train-size", "48", "--epochs", "1", "--batch-size", "12"]
    own += ["--gradient-accumulation", "4", "--out", str(tmp_path)]
    assert main([verb, "--model", tiny_folder, *FILES, *own]) == 0
    assert max(rows) == 3  # first guess, racers, and what is measured of a step


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto"])
def test_weights_have_the_type_that_is_asked_for(tiny_folder, dtype):
    model, _ = ModelSpec(tiny_folder, placement=Placement(dtype=dtype)).load(Task("sentence"))
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device-map", "everywhere"], "a device such as cpu or cuda:1, not 'everywhere'"),
        (["--max-memory", "cpu=1GB"], "--max-memory is for --device-map auto or sequential"),
        (["--device-map", "auto", "--max-memory", "cpu=much"], "'cpu=much' is not DEVICE=SIZE"),
        (["--device-map", "auto", "--max-memory", "disk=1GB"], "'disk=1GB' is not DEVICE=SIZE"),
        (["--gradient-accumulation", "0"], "--gradient-accumulation must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_folder, tmp_path, capsys, arguments, message):
    full = ["tune", "--model", tiny_folder, *FILES, *arguments, "--out", str(tmp_path / "out")]
    assert main(full) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_without_checkpointing_is_told():
    with pytest.raises(PlacementError, match="Linear knows no gradient checkpointing"):
        Placement(checkpointing=True).settle(torch.nn.Linear(2, 2))
