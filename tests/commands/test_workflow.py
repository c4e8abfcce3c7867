"""select, tune, evaluate, merge on the command line: one story, the same predictions at its end."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny

from beft_ext.commands.cli import main
from beft_ext.commands.demo import DATA
from beft_ext.commands.loading import classes_of
from beft_ext.models import TERMS
from beft_ext.tasks import Task

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


def test_biases_that_a_model_could_be_given(tmp_path, capsys):
    tiny("llama").model.save_pretrained(tmp_path)
    assert main(["biases", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (gate,) = (row for row in rows if row[:1] == ["mlp_gate"])
    place = "layers.0.mlp.gate_proj.bias"
    assert gate == ["mlp_gate", "2", "48", "96", "could", "be", "added", "yes", "yes", place]
    assert [row[0] for row in rows[1:8]] == list(TERMS[:7])


def test_tune_takes_layers_and_a_comma_joins(tiny_folder, tmp_path, capsys):
    args = ["tune", "--model", tiny_folder, *FILES, "--train-size", "32", "--epochs", "1"]
    assert main([*args, "--terms", "value@1,query+mlp_up@0", "--out", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["beft_ext"]["terms"] == ["query", "value@1", "mlp_up@0"]
    assert "value@1 " in capsys.readouterr().out
    assert main([*args, "--terms", "value", "--out", str(tmp_path), "--resume"]) == 2


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
        (["tune", "--lr", "auto", "--audition-budget", "nan"], "--audition-budget"),
        (["select", "--group-by", "user"], "row 1: no column 'user'"),
        (["evaluate", "--adapter", "nowhere"], "no adapter folder at nowhere"),
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


def test_a_rate_is_raced_once_and_kept(tiny_folder, tmp_path, capsys, monkeypatch):
    args = ["tune", "--model", tiny_folder, *FILES, "--train-size", "64", "--epochs", "1"]
    args += ["--terms", "query,value", "--out", str(tmp_path)]  # --lr auto
    assert main(args) == 0
    raced = json.loads((tmp_path / "audition.json").read_text())
    assert raced["best"] == "query+value" and raced["epochs"] <= 3
    middle = raced["rates"]["query+value"][1]
    assert 1e-4 <= middle <= 1e-2  # the gains' own step says which
    assert raced["rates"] == {"query+value": pytest.approx([middle / 3, middle, 3 * middle])}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "## Audition" in card and "raced to the end" in card
    assert "no rival is better" in capsys.readouterr().out

    def again(*_, **__):
        raise AssertionError("raced again")

    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    for work in ("workflow.audition", "workflow.measure_gains"):
        monkeypatch.setattr(f"beft_ext.commands.{work}", again)
    assert main([*args, "--resume"]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    monkeypatch.undo()
    # The checkpoint is of the rate that was chosen: another one is another run.
    other = next(r for r in raced["rates"]["query+value"] if r != raced["rate"])
    assert main([*args, "--lr", str(other), "--resume"]) == 2
    assert f"its lr is {raced['rate']}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "more", "reason"),
    [
        (64, ["--audition-budget", "0.1"], "a budget of 0.1 epochs of 64 rows is too small for 3"),
        (6, [], "a budget of 3 epochs of 6 rows is too small for 3 racers"),
        (2, [], "an audition needs 4 rows at least, but there are 2"),
    ],
)
def test_where_no_rate_can_be_raced_the_first_one_trains(
    tiny_folder, tmp_path, capsys, rows, more, reason
):
    """Where even the gains tell nothing, of two rows, that is the usual rate."""
    args = ["tune", "--model", tiny_folder, *FILES, "--train-size", str(rows), "--epochs", "1"]
    args += ["--terms", "value", "--out", str(tmp_path), *more]
    assert main(args) == 0
    (said,) = (x for x in capsys.readouterr().out.splitlines() if "no rates are raced" in x)
    assert said.startswith("'value' trains at ") and reason in said
    rate = float(said.split()[3].rstrip(","))
    assert rate == 1e-3 if rows == 2 else 1e-4 <= rate <= 1e-2
    assert not (tmp_path / "audition.json").exists()
    assert main([*args, "--resume"]) == 0


def test_rows_of_one_user_are_left_out_together(tiny_folder, tmp_path, capsys):
    from safetensors.torch import load_file

    texts = [f"{'gb'[i % 2]} {'abcdefgh'[i // 5]}{'vwxyz'[i % 5]}" for i in range(40)]
    rows = [f"{text},{i % 2},u{i // 5}" for i, text in enumerate(texts)]
    (tmp_path / "rows.csv").write_text("\n".join(["sentence,label,user", *rows, ""]))
    args = ["--model", tiny_folder, "--train-file", str(tmp_path / "rows.csv")]
    for column, count in (("user", 8), (None, 40)):
        out = tmp_path / str(column)
        more = ["--group-by", column] if column else []
        assert main(["select", *args, *more, "--steps", "0", "--out", str(out)]) == 0
        groups = load_file(out / "gains.safetensors")["groups"]
        assert len(groups.unique()) == count and len(groups) == 40
        task = json.loads((out / "selection.json").read_text())["task"]
        assert task.get("group") == column
    args += ["--validation-split", "0.2", "--group-by", "user", "--epochs", "1", "--terms", "auto"]
    assert main(["tune", *args, "--out", str(tmp_path / "out")]) == 0


def test_validation_rows_do_not_race(tiny_folder, tmp_path, monkeypatch):
    seen = []
    race = "beft_ext.commands.workflow.audition"

    def watched(contenders, batches, *more, **options):
        seen.extend(tuple(r.fields[0]["input_ids"]) for r in batches.rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(race, watched)
    args = ["--train-size", "64", "--epochs", "1", "--terms", "value", "--lr", "auto"]
    assert main(["tune", "--model", tiny_folder, *FILES, *args, "--out", str(tmp_path)]) == 130
    assert len(seen) == 64


def test_a_validation_file_is_asked_for(tiny_folder, tmp_path, capsys):
    args = ["--model", tiny_folder, *FILES[:2], "--out", str(tmp_path)]
    assert main(["tune", *args]) == 2
    assert "--validation-file" in capsys.readouterr().err


def limited(size, *args):
    """The command where no file may grow beyond ``size`` bytes, as on a full disk."""
    script = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        "from beft_ext.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_merge_that_fails_leaves_what_was_there(tiny_folder, tuned, tmp_path):
    args = ["merge", "--model", tiny_folder, "--adapter", str(tuned / "adapter")]
    out = tmp_path / "merged"
    assert main([*args, "--out", str(out)]) == 0
    before = files(out)
    for folder in (out, tmp_path / "new"):
        done = limited(40_000, *args, "--out", folder)
        assert done.returncode == 2
        assert "could not be written" in done.stderr.strip().splitlines()[-1], done.stderr
    assert files(out) == before and not files(tmp_path / "new")


@pytest.mark.parametrize("moved", range(5))
def test_a_merge_that_is_killed_is_no_mixture(tiny_folder, tuned, tmp_path, monkeypatch, moved):
    args = ["merge", "--model", tiny_folder, "--adapter", str(tuned / "adapter")]
    args += ["--out", str(tmp_path)]
    (tmp_path / "config.json").write_text("{}")
    replace, left = Path.replace, iter(range(moved))

    def killing(path, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killing)
        done = main(args)
    assert done == (130 if not (tmp_path / "config.json").exists() else 0)
    assert not list(tmp_path.glob(".partial*"))
    assert main(args) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("adapter_config.json", "holds an adapter"), ("model-00001-of-00002.safetensors", "mixed")],
)
def test_merge_into_a_folder_of_something_else(tiny_folder, tuned, tmp_path, capsys, name, message):
    args = ["merge", "--model", tiny_folder, "--adapter", str(tuned / "adapter"), "--out"]
    (tmp_path / name).write_text("{}")
    assert main([*args, str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(files(tmp_path)) == [name]
    assert main([*args, tiny_folder]) == 2
    assert "the folder of the model itself" in capsys.readouterr().err


def test_an_interrupted_command_says_what_there_is_and_how_to_go_on(
    tiny_folder, tmp_path, capsys, monkeypatch
):
    args = ["--model", tiny_folder, *FILES, *SHORT, "--out", str(tmp_path)]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def told(*command):
        assert main(list(command)) == 130
        return capsys.readouterr().err.strip().splitlines()[-1]

    with monkeypatch.context() as patched:
        patched.setattr("beft_ext.commands.workflow.select", interrupted)
        assert "nothing was written" in told("select", *args)
        assert "nothing was written yet: start again" in told("tune", *args)
    with monkeypatch.context() as patched:
        patched.setattr("beft_ext.commands.tuning.tune", interrupted)
        assert "selection is whole: the same command with --resume" in told("tune", *args)
    with monkeypatch.context() as patched:
        patched.setattr("beft_ext.training.tuning._TuningRun.write_history", interrupted)
        more = ["--terms", "value", "--save-every", "1"]
        assert "checkpoint.safetensors is whole" in told("tune", *args, *more)
        assert "runs.jsonl holds 0 results" in told("compare", *args, "--methods", "value")


def test_another_model_or_other_rows_are_not_resumed(tiny_folder, tuned, tmp_path, capsys):
    out = Path(shutil.copytree(tuned, tmp_path / "out"))
    rows = (DATA / "train.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[::-1]))
    files = ["--train-file", str(tmp_path / "rows.jsonl"), *FILES[2:]]
    more = [*SHORT, "--out", str(out), "--resume"]
    assert main(["tune", "--model", tiny_folder, *files, *more]) == 2
    assert "other data" in capsys.readouterr().err
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    torch.manual_seed(5)
    model = transformers.AutoModel.from_pretrained(other)
    torch.nn.init.normal_(model.encoder.layer[1].output.dense.weight, std=0.02)
    model.save_pretrained(other)
    assert main(["tune", "--model", str(other), *FILES, *more]) == 2
    assert "its model is another one" in capsys.readouterr().err


def test_targets_of_a_regression_call_for_no_classes():
    prices = Task(text="{a}", kind="regression").examples([{"a": "x", "label": 20_000}], "rows")
    kinds = Task(text="{a}").examples([{"a": "x", "label": 2}, {"a": "y", "label": 0}], "rows")
    assert classes_of(prices) == 1
    assert classes_of(kinds) == 3
