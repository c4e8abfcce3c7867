"""A csv whose labels are words, on the command line: the classes stay the training rows'."""

import csv
import json

import pytest
import transformers

from beft_ext.adapters import class_names
from beft_ext.commands.cli import main

CLASSES = ["delivery", "praise", "refund"]


def write(path, labels, column="label"):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence", column])
        rows.writerows((f"{label} number {i}", label) for i, label in enumerate(labels))
    return str(path)


@pytest.fixture(scope="module")
def tuned(tiny_folder, tmp_path_factory):
    """A folder with train.csv, validation.csv, and what tune made of them in out/."""
    folder = tmp_path_factory.mktemp("words")
    train = write(folder / "train.csv", ["refund", "praise", "delivery", "praise"] * 4)
    validation = write(folder / "validation.csv", ["refund", "praise"] * 2)
    files = ["--train-file", train, "--validation-file", validation]
    args = ["--terms", "value", "--epochs", "1", "--out", str(folder / "out")]
    assert main(["tune", "--model", tiny_folder, *files, *args]) == 0
    return folder


def evaluated(out, *args):
    assert main(["evaluate", *map(str, args), "--out", str(out)]) == 0
    return json.loads((out / "evaluation.json").read_text())


def test_the_classes_go_into_adapter_merged_model_and_evaluation(tiny_folder, tuned, tmp_path):
    adapter = ["--model", tiny_folder, "--adapter", tuned / "out" / "adapter"]
    assert class_names(tuned / "out" / "adapter") == CLASSES
    assert main(["merge", *map(str, adapter), "--out", str(tmp_path / "merged")]) == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.id2label == dict(enumerate(CLASSES))
    assert config.label2id == {name: i for i, name in enumerate(CLASSES)}
    # One row, of the last class: what is at hand does not number the classes.
    rows = ["--validation-file", write(tmp_path / "one.csv", ["refund"])]
    found = [evaluated(tmp_path, *adapter, *rows)]
    found.append(evaluated(tmp_path, "--model", tmp_path / "merged", *rows))
    for record in found:
        assert record["classes"] == CLASSES
        assert record["metrics"]["accuracy"] == float(record["predictions"] == [2])
    assert found[0]["predictions"] == found[1]["predictions"]


def test_a_class_that_no_training_row_has_is_refused(tiny_folder, tuned, tmp_path, capsys):
    files = ["--train-file", str(tuned / "train.csv")]
    files += ["--validation-file", write(tmp_path / "v.csv", ["refund", "other"])]
    args = ["--terms", "value", "--out", str(tmp_path)]
    assert main(["tune", "--model", tiny_folder, *files, *args]) == 2
    told = "v.csv, row 2: label 'other' is none of the classes of the training rows, delivery, "
    assert told in capsys.readouterr().err
    args = ["--adapter", str(tuned / "out" / "adapter"), *files[2:]]
    assert main(["evaluate", "--model", tiny_folder, *args]) == 2
    assert "row 2: label 'other' is none of the classes" in capsys.readouterr().err


def test_numbers_are_targets_where_it_is_said(tiny_folder, tmp_path, capsys):
    files = ["--train-file", write(tmp_path / "t.csv", [0.5, 2, 3.5, 4] * 4)]
    files += ["--validation-file", write(tmp_path / "v.csv", [1, 2.5, 0])]
    args = ["tune", "--model", tiny_folder, *files, "--terms", "value", "--epochs", "1"]
    args += ["--out", str(tmp_path / "out")]
    assert main(args) == 2
    assert "give --kind regression" in capsys.readouterr().err
    assert main([*args, "--kind", "regression"]) == 0
    args = ["--adapter", tmp_path / "out" / "adapter", *files[2:], "--kind", "regression"]
    record = evaluated(tmp_path, "--model", tiny_folder, *args)
    assert record["classes"] == []
    assert [type(p) for p in record["predictions"]] == [float] * 3


def test_a_head_that_nobody_trained_does_not_answer(tiny_folder, tuned, tmp_path, capsys):
    rows = ["--validation-file", str(tuned / "validation.csv")]
    told = "has no trained head, and a new one ('classifier.bias') would answer at random: tune it"
    for more in ([], ["--kind", "regression"]):
        assert main(["evaluate", "--model", tiny_folder, *rows, *more]) == 2
        assert told in capsys.readouterr().err
    args = ["--file", rows[1], "--out", str(tmp_path / "x.csv")]
    assert main(["predict", "--model", tiny_folder, *args]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "x.csv").exists()


def test_an_adapter_knows_what_the_columns_mean(tiny_folder, tmp_path):
    lines = [f"{i},word {i},{i / 4}" for i in range(12)]
    (tmp_path / "t.csv").write_text("\n".join(["id,the {text},price", *lines]))
    columns = ["--text-column", "the {text}", "--label-column", "price", "--kind", "regression"]
    rows = ["--train-file", str(tmp_path / "t.csv"), "--validation-split", "0.3", "--metric"]
    args = ["--terms", "value", "--epochs", "1", "--out", str(tmp_path / "out")]
    asked = [*rows, "spearman,pearson", *columns]
    assert main(["tune", "--model", tiny_folder, *asked, *args]) == 0
    adapter = ["--model", tiny_folder, "--adapter", str(tmp_path / "out" / "adapter")]
    record = evaluated(tmp_path, *adapter, "--validation-file", tmp_path / "t.csv")
    assert list(record["metrics"]) == ["spearman", "pearson"]
    task = {"text": {"column": "the {text}"}, "label": "price", "kind": "regression"}
    assert record["task"] == task | {"metrics": ["spearman", "pearson"]}
    args = ["--file", str(tmp_path / "t.csv"), "--out", str(tmp_path / "x.csv")]
    assert main(["predict", *adapter, *args]) == 0
    with (tmp_path / "x.csv").open(newline="") as file:
        found = [float(row["prediction"]) for row in csv.DictReader(file)]
    assert found == pytest.approx(record["predictions"], rel=1e-4)


def test_what_cannot_work_is_told_before_the_training(
    tiny_folder, tuned, tmp_path, capsys, monkeypatch
):
    def training(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("beft_ext.commands.tuning.tune", training)
    files = ["--train-file", str(tuned / "train.csv"), "--validation-split", "0.2"]
    args = ["tune", "--model", tiny_folder, *files, "--out", str(tmp_path), "--terms"]
    assert main([*args, "key+value"]) == 130
    told = capsys.readouterr().err
    assert "note: term 'key' is dead in this model" in told and "'value'" not in told
    assert main([*args, "value", "--metric", "f1"]) == 2
    assert "metric 'f1' is for two classes: use f1_macro" in capsys.readouterr().err
    assert main([*args, "value", "--metric", "pearson"]) == 2
    assert "'pearson' does not suit a classification task: use acc" in capsys.readouterr().err


def test_lines_come_in_a_log_as_the_work_goes_on(tiny_folder, tuned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("beft_ext.progress.FIRST", 0.0)
    monkeypatch.setattr("beft_ext.progress.EVERY", 0.0)
    files = ["--train-file", str(tuned / "train.csv"), "--validation-split", "0.2"]
    args = ["tune", "--model", tiny_folder, *files, "--out", str(tmp_path), "--epochs", "2"]
    raced = ["--batch-size", "4", "--audition-budget", "12"]
    assert main([*args, *raced]) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    for told in ("gains: 8 of 13", "audition: 1 of", "evaluation: 1 of 1", "tune: 3 of 8"):
        assert any(line.startswith(told) for line in lines), lines
    order = [
        "sure",
        "auto: ",
        "before training  accuracy",
        "epoch 1 ",
        "epoch 2 ",
        "best on validation",
    ]
    places = [printed.out.index(text) for text in order]
    assert places == sorted(places)
