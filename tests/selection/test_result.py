"""A selection as a table and as files: read back it is the same, or refused in a sentence."""

import json
import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import beft_ext
from beft_ext import SelectionError, plots
from beft_ext.files import save_json
from beft_ext.scores import SCORES
from beft_ext.selection import Selection
from beft_ext.selection.result import BIASES, PICTURE, RECORD, read_selection

VALUES = {"query": [0.25, 0.75], "key": [0.0, 0.0], "value": [math.nan, 1.0]}


@pytest.fixture
def made():
    """Numbers that are exact in binary; 'value' is undefined by the BEFT score alone."""
    means = {t: sum(v) / 2 for t, v in VALUES.items()}
    other = means | {"value": 2.0}
    return Selection(
        method="beft",
        scores={m: means if m == "beft" else other for m in SCORES},
        per_layer={m: VALUES for m in SCORES},
        ranking={m: ["query"] if m == "beft" else ["value", "query"] for m in SCORES},
        undefined={"value": "the initial bias is zero in layer 0"},
        dead=["key"],
        obtuse=["1.query"],
        losses=[0.5, 0.25],
        steps=2,
        model="/home/models/tiny-bert",
        initial={"0.query": torch.ones(3)},
        current={"0.query": torch.tensor([1.0, 2.0, 3.0])},
    )


def test_what_was_saved_is_read_back(made, tmp_path):
    made.save(tmp_path)
    for path in (tmp_path, tmp_path / RECORD):
        found = read_selection(path)
        assert repr(found.scores) == repr(made.scores)  # NaN is not equal to itself
        for name in (
            "method",
            "ranking",
            "undefined",
            "dead",
            "obtuse",
            "losses",
            "steps",
            "best",
            "model",
        ):
            assert getattr(found, name) == getattr(made, name)
        assert str(found) == str(made) and found.initial == found.current == {}
    tensors = load_file(tmp_path / BIASES)
    assert tensors["initial/0.query"].tolist() == [1, 1, 1]
    assert tensors["current/0.query"].tolist() == [1, 2, 3] and len(tensors) == 2
    assert (tmp_path / PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_the_picture_says_model_task_and_score_and_shows_the_dead(made, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "heatmap", lambda *given, **told: seen.append((*given[:2], told)))
    layers = {"value": [0.5, 0.25], "query@1-2": [0.1, 0.2]}
    found = replace(made, per_layer={"beft": layers})
    with suppress(FileNotFoundError):  # nothing was drawn
        found.plot(tmp_path / "x", "own.csv")
    with suppress(FileNotFoundError):
        replace(found, model="").plot(tmp_path / "x")
    (rows, title, told), (_, bare, _) = seen
    assert title == "models/tiny-bert, own.csv: beft" and bare == "beft"
    assert rows["value"] == [0.5, 0.25] and rows["query@1-2"] == [None, 0.1, 0.2]
    assert len(rows["key"]) == 3 and all(map(math.isnan, rows["key"]))
    assert told == {"score": "beft", "dead": ["key"]}
    with suppress(FileNotFoundError):
        found.save(tmp_path, {"task": {"name": "sst2", "text": "{sentence}"}})
    assert seen[-1][1] == "models/tiny-bert, sst2: beft"


def test_the_record_is_plain_json(made, tmp_path):
    """For any reader: null where there is no number, and what no table shows."""
    made.save(tmp_path)
    record = json.loads((tmp_path / RECORD).read_text(), parse_constant=lambda name: 1 / 0)
    assert record["version"] == beft_ext.__version__
    assert record["best"] == "query" and record["above_90_degrees"] == ["1.query"]
    assert record["scores"]["beft"] == {"query": 0.5, "key": 0, "value": None}
    assert record["per_layer"]["beft"]["value"] == [None, 1.0]
    assert record["steps"] == 2 and record["losses"] == [0.5, 0.25]
    replace(made, ranking={"beft": []}).save(tmp_path)
    assert json.loads((tmp_path / RECORD).read_text())["best"] is None


def test_the_table_ranks_and_marks(made):
    lines = [line.split() for line in str(made).splitlines()]
    assert lines[0] == ["term", *SCORES]
    assert [line[:3] for line in lines[1:]] == [
        ["1.", "query", "5.0000e-01"],
        ["-", "key", "0.0000e+00"],
        ["-", "value", "nan"],
    ]
    assert [line[-1] for line in lines[1:]] == ["5.0000e-01", "dead", "undefined"]
    other = [line.split()[:2] for line in str(replace(made, method="magnitude")).splitlines()]
    assert other[1:] == [["1.", "value"], ["2.", "query"], ["-", "key"]]


def test_a_long_name_has_its_column_and_a_notebook_sees_two_lines(made):
    name = "cross_attention_output@10-11"
    scores = {m: own | {name: 1.0} for m, own in made.scores.items()}
    head, *rows = str(replace(made, scores=scores)).splitlines()
    (row,) = (row for row in rows if name in row)
    assert row[: head.index("beft") + 4].split() == ["-", name, "1.0000e+00"]
    first = "<Selection by 'beft': query 0.5\n"
    assert repr(made) == first + " dead: key; undefined: value; 2 of 2 steps>"
    ranked = replace(made, method="snr", ranking={"snr": ["value", "query", "a", "b"]})
    ranked.scores["snr"].update(a=0.1, b=0.1)
    assert repr(ranked).startswith("<Selection by 'snr': value 2 > query 0.5 > a 0.1 > 1 more\n")
    assert "undefined" not in repr(ranked)
    assert "no term is ranked" in repr(replace(made, ranking={"beft": []}))


def test_without_a_ranking_there_is_no_best(made):
    with pytest.raises(SelectionError, match="no term has a defined 'beft' score: select anew"):
        replace(made, ranking={"beft": []}).best  # noqa: B018


def changed(folder, **values):
    """Another record with a digest of its own."""
    record = json.loads((folder / RECORD).read_text()) | values
    record = {k: v for k, v in record.items() if v is not None}
    save_json(folder / RECORD, record | {"sha256": "0" * 64} if "sha256" in record else record)


SPOILT = {
    "another file": (lambda f: (f / RECORD).write_text("[]"), "is not a selection.json"),
    "no JSON": (lambda f: (f / RECORD).write_text("{"), "is not a selection.json"),
    "too deep": (lambda f: (f / RECORD).write_text("[" * 100_000), "is not a selection.json"),
    "no file": (lambda f: (f / RECORD).unlink(), "is not a selection.json"),
    "another key": (lambda f: changed(f, extra=1), "has the key 'extra'"),
    "a key less": (lambda f: changed(f, dead=None), "is not a selection.json: 'dead'"),
    "no digest": (lambda f: changed(f, sha256=None), "its digest is not whole"),
    "no digest of the biases": (lambda f: changed(f, biases=None), "its digest is not whole"),
    "other biases": (lambda f: changed(f, biases="1" * 64), "of another selection"),
    "cut biases": (
        lambda f: (f / BIASES).write_bytes((f / BIASES).read_bytes()[:-1]),
        "is damaged",
    ),
    "an edited number": (
        lambda f: (f / RECORD).write_text((f / RECORD).read_text().replace("0.25", "0.75")),
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_not_whole_is_refused(case, made, tmp_path):
    made.save(tmp_path)
    spoil, message = SPOILT[case]
    spoil(tmp_path)
    with pytest.raises(SelectionError, match=message):
        read_selection(tmp_path)


def test_the_record_alone_will_do(made, tmp_path):
    """The biases are large, and may lie elsewhere; so may what was saved before digests were."""
    made.save(tmp_path)
    (tmp_path / BIASES).unlink()
    assert read_selection(tmp_path).best == "query"
    changed(tmp_path, biases=None, sha256=None)
    assert read_selection(tmp_path).best == "query"
