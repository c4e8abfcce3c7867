"""select, tune, evaluate, merge on the command line: one story, the same predictions at its end."""

import json

import pytest
import transformers

from beft_ext.commands.cli import main
from beft_ext.commands.demo import DATA

FILES = ["--train-file", str(DATA / "train.jsonl")]
FILES += ["--validation-file", str(DATA / "validation.jsonl")]
SHORT = ["--train-size", "64", "--epochs", "2", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def tuned(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    assert main(["tune", "--model", tiny_folder, *FILES, *SHORT, "--out", str(out)]) == 0
    return out


def test_tune_writes_all_it_promises(tuned):
    lines = [json.loads(x) for x in (tuned / "log.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines] == [1, 2] and all(0 <= x["accuracy"] <= 1 for x in lines)
    assert (tuned / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (tuned / "selection" / "selection.json").is_file()
    names = {p.name for p in (tuned / "adapter").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "README.md"}


def test_evaluate_and_merge_agree_to_the_last_example(tiny_folder, tuned, tmp_path):
    def evaluate(model, *more):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert main(["evaluate", "--model", model, *FILES, *more, "--out", str(out)]) == 0
        return json.loads((out / "evaluation.json").read_text())

    adapter, merged = ["--adapter", str(tuned / "adapter")], str(tmp_path / "merged")
    best = max(json.loads(x)["accuracy"] for x in (tuned / "log.jsonl").read_text().splitlines())
    with_adapter = evaluate(tiny_folder, *adapter)
    assert with_adapter["metrics"]["accuracy"] == best
    assert main(["merge", "--model", tiny_folder, *adapter, "--out", merged]) == 0
    assert evaluate(merged)["predictions"] == with_adapter["predictions"]
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
    assert type(plain) is transformers.BertForSequenceClassification


def test_resuming_what_is_done_changes_nothing(tiny_folder, tuned):
    adapter = tuned / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    args = ["--model", tiny_folder, *FILES, *SHORT, "--out", str(tuned), "--resume"]
    assert main(["tune", *args]) == 0
    assert adapter.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tune", "--terms", "valu"], "valu"),
        (["tune", "--lr", "0"], "--lr"),
        (["tune", "--lr", "nan"], "--lr"),
        (["tune", "--batch-size", "0"], "--batch-size"),
        (["evaluate", "--adapter", "nowhere"], "nowhere"),
        (["merge", "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_folder, tmp_path, capsys, args, message):
    verb, *more = args
    files = [] if verb == "merge" else FILES
    full = [verb, "--model", tiny_folder, *files, *more, "--out", str(tmp_path / "out")]
    assert main(full) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("beft-ext: ") and message in error


def test_a_validation_file_is_asked_for(tiny_folder, tmp_path, capsys):
    args = ["--model", tiny_folder, *FILES[:2], "--out", str(tmp_path)]
    assert main(["tune", *args]) == 2
    assert "--validation-file" in capsys.readouterr().err
