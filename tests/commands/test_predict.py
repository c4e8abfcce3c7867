"""predict: what evaluate says of labelled rows, said of rows that have no labels."""

import csv
import json

import pytest
import transformers

from beft_ext.commands import predict
from beft_ext.commands.cli import main
from beft_ext.tasks import read_rows

WORDS = ["abc", "d", "ef gh", "i jkl m", "n", 'o, "p"', "qr\nst", "u v w x y z"]
QUESTION = {"text": "{text}", "prompt": "{text} It was", "options": [" terrible", " great"]}


def rows_of(labels, count=24):
    return [{"text": WORDS[i % 8] + " a" * i, "label": labels[i % len(labels)], "id": i}
            for i in range(count)]  # fmt: skip


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def classifier(tiny_folder, tmp_path_factory):
    """A folder with a head of its own."""
    folder = tmp_path_factory.mktemp("classifier")
    kind = transformers.AutoModelForSequenceClassification
    kind.from_pretrained(tiny_folder, id2label={0: "no", 1: "yes"}).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return str(folder)


def both(tmp_path, model, labels, *more, adapter=None, suffix="jsonl"):
    """What evaluate predicts of rows, and what predict writes of them without their labels."""
    rows = rows_of(labels)
    given = ["--model", model, "--text-column", "text", *more]
    given += ["--adapter", str(adapter)] if adapter else []
    file = write(tmp_path / "labelled.jsonl", rows)
    assert main(["evaluate", *given, "--validation-file", file, "--out", str(tmp_path)]) == 0
    evaluated = json.loads((tmp_path / "evaluation.json").read_text())
    file = write(tmp_path / "bare.jsonl", [{k: r[k] for k in ("text", "id")} for r in rows])
    out = tmp_path / f"answers.{suffix}"
    assert main(["predict", *given, "--file", file, "--out", str(out), "--batch-size", "5"]) == 0
    answers = read_rows(out)
    assert [(a["text"], int(a["id"])) for a in answers] == [(r["text"], r["id"]) for r in rows]
    return evaluated, answers


def tuned(tmp_path, model, labels, *more):
    file = write(tmp_path / "train.jsonl", rows_of(labels))
    files = ["--train-file", file, "--validation-file", file, "--text-column", "text"]
    args = ["--terms", "value", "--epochs", "2", "--lr", "5e-2", "--out", str(tmp_path / "out")]
    assert main(["tune", "--model", model, *files, *args, *more]) == 0
    return tmp_path / "out" / "adapter"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_classes_and_probabilities_are_those_that_evaluate_counts(tiny_folder, tmp_path, suffix):
    classes = ["delivery", "praise", "refund"]
    adapter = tuned(tmp_path, tiny_folder, classes)
    evaluated, answers = both(tmp_path, tiny_folder, classes, adapter=adapter, suffix=suffix)
    assert [a["prediction"] for a in answers] == [classes[p] for p in evaluated["predictions"]]
    for answer in answers:
        each = answer.get("probabilities") or {c: answer[f"probability_{c}"] for c in classes}
        each = {name: float(value) for name, value in each.items()}
        assert list(each) == classes and sum(each.values()) == pytest.approx(1)
        assert max(each, key=each.get) == answer["prediction"]
        assert float(answer["probability"]) == max(each.values())


def test_numbers(tiny_folder, tmp_path):
    more = ["--kind", "regression"]
    adapter = tuned(tmp_path, tiny_folder, [0.5, 1, 2.25], *more)
    evaluated, answers = both(tmp_path, tiny_folder, [0.5, 1], *more, adapter=adapter)
    # Batches of other sizes: fp32 sums in another order.
    assert [a["prediction"] for a in answers] == pytest.approx(evaluated["predictions"], rel=1e-4)
    assert set(answers[0]) == {"text", "id", "prediction"}


def test_options_of_a_decoder_and_its_texts(tiny_decoder, tmp_path):
    config = tmp_path / "task.json"
    config.write_text(json.dumps(QUESTION))
    evaluated, answers = both(tmp_path, tiny_decoder, [0, 1], "--task-config", str(config))
    assert [int(a["prediction"]) for a in answers] == evaluated["predictions"]
    assert all(set(a["probabilities"]) == {"0", "1"} for a in answers)
    config.write_text(json.dumps({"text": "", "prompt": "{text}", "kind": "generation",
                                  "answers": "label"}))  # fmt: skip
    evaluated, answers = both(tmp_path, tiny_decoder, ["a", "b"], "--task-config", str(config))
    assert [a["prediction"] for a in answers] == evaluated["predictions"]


def test_a_models_own_head_needs_no_adapter(classifier, tmp_path):
    evaluated, answers = both(tmp_path, classifier, ["no", "yes"])
    assert [a["prediction"] for a in answers] == [
        ("no", "yes")[p] for p in evaluated["predictions"]
    ]


def test_some_rows_are_held_at_a_time(classifier, tmp_path, monkeypatch):
    """The reader is never ahead of the writer by more than a part."""
    read, ahead = [], []
    original, joined = predict.iterate_rows, predict._joined

    def counted(path):
        for row in original(path):
            read.append(row)
            yield row

    def seen(row, record):
        ahead.append(len(read) - len(ahead))
        return joined(row, record)

    monkeypatch.setattr(predict, "iterate_rows", counted)
    monkeypatch.setattr(predict, "_joined", seen)
    monkeypatch.setattr(predict, "SORTED_BATCHES", 2)
    file = write(tmp_path / "rows.jsonl", rows_of(["no"], 100))
    args = [
        "predict",
        "--model",
        classifier,
        "--text-column",
        "text",
        "--file",
        file,
        "--out",
        str(tmp_path / "x.csv"),
    ]
    assert main([*args, "--batch-size", "4"]) == 0
    assert len(ahead) == 100 and max(ahead) == 8
    with (tmp_path / "x.csv").open(newline="") as opened:
        assert [r["id"] for r in csv.DictReader(opened)] == [str(i) for i in range(100)]


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ([{"text": "a"}, {"txt": "b"}], "x.csv", "rows.jsonl, row 2: no column 'text'; it has txt"),
        ([{"text": "a", "prediction": 1}], "x.csv", "row 1: there is a column 'prediction' alr"),
        ([{"text": "a"}, {"text": "b", "c": 1}], "x.csv", "row 2 has a column 'c' that the first"),
        ([{"text": "a"}], "x.txt", "the file's name ends in .csv or .jsonl"),
        ([{"text": "a"}], "rows.jsonl", "is the file that is read"),
        ([], "x.csv", "there are no rows"),
    ],
)
def test_what_cannot_be_answered_leaves_what_was_there(
    classifier, tmp_path, capsys, rows, name, message
):
    before = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "x.csv").write_text("old")
    args = ["predict", "--model", classifier, "--text-column", "text", "--file", before]
    assert main([*args, "--out", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "x.csv").read_text() == "old"
    assert not list(tmp_path.glob(".partial*"))
