"""Which rows train, validate and test: disjoint, by class, the same for the same seed."""

import json
from collections import Counter

import pytest

from beft_ext.commands.cli import main
from beft_ext.commands.loading import WorkflowError
from beft_ext.commands.sources import Parts, Source

LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    lines = [{"sentence": f"{label} {i}", "label": label} for i, label in enumerate(LABELS)]
    path.write_text("\n".join(map(json.dumps, lines[::-1])))
    return path


def source(rows, **parts):
    return Source(train_file=rows, parts=Parts(**parts))


def texts(found, *splits):
    return [[e.text for e in found.read(split)] for split in splits]


def test_parts_are_disjoint_by_class_and_seeded(rows):
    made = source(rows, validation=0.1, test=0.2)
    parts = texts(made, "train", "validation", "test")
    assert [len(p) for p in parts] == [70, 10, 20]
    assert len({t for part in parts for t in part}) == 100
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        counts = Counter(text[0] for text in part)
        # Of a class of n rows, one of which stays: its share to a row or two.
        assert all(abs(counts[c] - share * LABELS.count(c)) < 2 for c in "abc")
        assert [int(t[2:]) for t in part] == sorted((int(t[2:]) for t in part), reverse=True)
    assert "d 99" in parts[0]  # a class of one row trains
    assert texts(source(rows, validation=0.1, test=0.2), "test") == parts[2:]
    assert texts(source(rows, validation=0.1, test=0.2, seed=1), "test") != parts[2:]


def test_a_number_of_rows(rows):
    assert [len(p) for p in texts(source(rows, validation_size=7), "train", "validation")] == [
        93,
        7,
    ]
    both = Source(train_file=rows, validation_file=rows, parts=Parts(validation_size=7))
    train, validation = texts(both, "train", "validation")
    assert (len(train), len(validation)) == (100, 7) and set(validation) <= set(train)
    assert texts(Source(train_file=rows, parts=Parts(test_file=rows)), "test") == texts(
        both, "train"
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"validation": 1.5}, "--validation-split is a share between 0 and 1, not 1.5"),
        ({"test": 0.0}, "--test-split is a share between 0 and 1"),
        ({"validation_size": 0}, "--validation-size must be at least 1"),
        ({"validation_size": 97}, "97 of 100 rows cannot be held back, for each class keeps one"),
        ({"validation": 0.1, "validation_size": 5}, "give --validation-split or --validation-size"),
        ({"test": 0.1, "test_file": "x"}, "give --test-file or --test-split"),
    ],
)
def test_parts_that_cannot_be_are_refused(rows, parts, message):
    with pytest.raises(WorkflowError, match=message):
        source(rows, **parts).read("train")


def test_only_rows_that_no_choice_saw_are_called_after(tiny_folder, rows, tmp_path, capsys):
    args = ["tune", "--model", tiny_folder, "--train-file", str(rows), "--terms", "value"]
    args += ["--epochs", "2", "--lr", "1e-2", "--validation-split", "0.2"]
    assert main([*args, "--out", str(tmp_path / "v")]) == 0
    printed = capsys.readouterr().out
    assert "before training  accuracy" in printed and "(always 'a': 0.6" in printed
    assert "best on validation" in printed and " after" not in printed
    record = json.loads((tmp_path / "v" / "evaluation.json").read_text())
    found = record["evaluation"]
    assert (found["rows"], found["examples"], found["after"]) == ("validation", 20, None)
    log = [json.loads(line) for line in (tmp_path / "v" / "log.jsonl").read_text().splitlines()]
    assert found["best_on_validation"]["accuracy"] == max(r["accuracy"] for r in log)
    card = (tmp_path / "v" / "adapter" / "README.md").read_text()
    assert "best on validation" in card and "after training" not in card

    assert main([*args, "--test-split", "0.1", "--out", str(tmp_path / "t")]) == 0
    printed = capsys.readouterr().out
    assert "after, on 10 test rows that no choice saw (best on validation: " in printed
    kept = json.loads((tmp_path / "t" / "evaluation.json").read_text())["evaluation"]
    assert (kept["rows"], kept["examples"]) == ("test", 10)
    card = (tmp_path / "t" / "adapter" / "README.md").read_text()
    assert f"| after training | {kept['after']['accuracy']:.4f} |" in card
    # The same rows again, by evaluate: the same seed draws them.
    args = ["evaluate", "--model", tiny_folder, "--adapter", str(tmp_path / "t" / "adapter")]
    args += ["--train-file", str(rows), "--test-split", "0.1", "--out", str(tmp_path / "e")]
    assert main(args) == 0
    again = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert (again["rows"], again["metrics"]) == ("test", kept["after"])
