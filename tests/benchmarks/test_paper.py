"""The paper's tables: cells as the authors' scripts have them, runs, resumption, the page."""

import json
import re
import sys
from pathlib import Path

import pytest

from beft_ext.commands.methods import method
from beft_ext.tasks import TASKS, named_task

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "benchmarks" / "paper"

# By task as in run_BEFT.py: rate, epochs of the base and of the larger encoders, rows of the low,
# medium and high regime; "-" where the script holds none.
ENCODERS = """
cola 7e-4 16 -  1710 3420 4275
mnli 1e-4 30 -  1000 5000 9000
mrpc 7e-4 60 -  367  1191 1835
qnli 1e-4 30 -  1000 5000 9000
qqp  4e-4 30 -  1000 5000 9000
rte  1e-3 30 30 300  900  1200
sst2 4e-4 16 30 1000 5000 11000
stsb 1e-4 60 -  287  1150 2300
cb   1e-3 60 60 -    -    -
wic  1e-3 16 30 -    -    -
"""
# As in finetune.sh and finetune_BEFT.sh: rate, rows; "-" where the split is below 1,000.
DECODERS = """
sst2 1e-3 1000
rte 1e-3 1000
cb 1e-2 -
boolq 1e-3 1000
wsc 1e-2 -
wic 1e-3 1000
multirc 1e-3 1000
copa 1e-4 -
record 1e-4 1000
squad 1e-3 1000
drop 1e-3 1000
"""


@pytest.fixture(autouse=True)
def _paper_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))
    yield
    for name in [p.stem for p in PAPER.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path):
    """Generated rows of two tasks that an encoder and a decoder can be asked."""
    import decoder

    decoder.write_tasks(tmp_path / "data", {"train": 24, "validation": 12})
    return tmp_path / "data"


def rows_of(text):
    lines = (line.split() for line in text.strip().splitlines())
    number = {"-": None}
    return {name: [number.get(x, x) for x in rest] for name, *rest in lines}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def paper_run(tmp_path, table, model, *more):
    import run

    short = ["--rows", "16", "--epochs", "1", "--evaluated", "8", "--seeds", "1"]
    places = ["--out", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    run.main(["--table", table, "--model", model, "--name", "tiny", *short, *places, *more])
    return tmp_path / "results" / f"table{table}.jsonl"


def test_every_cell_is_of_a_known_task_and_method():
    import cells

    for table in cells.TABLES:
        found = cells.cells(table)
        assert len(set(found)) == len(found) > 0
        for cell in found:
            assert cell.table == table and cell.task in TASKS and cell.metric
            assert cell.regime in cells.ROWS and cell.metric in named_task(cell.task).metrics
            if table != cells.HEATMAPS:
                assert method(cell.method).trains == (cell.hyper.lr is not None)


def test_encoders_have_the_authors_hyperparameters():
    import cells

    theirs = rows_of(ENCODERS)
    for cell in [c for table in "1234" for c in cells.cells(table)]:
        rate, base, larger, *rows = theirs[cell.task]
        rate = "1e-5" if cell.method == "full" else rate
        epochs = base if cell.model == cells.BERT else larger
        epochs = "50" if cell.table == "4" else epochs
        size = rows[("low", "medium", "high").index(cell.regime)]
        found = cell.hyper
        assert found.lr == float(rate) and found.epochs == int(epochs)
        assert found.rows == (None if size is None else int(size))
        assert (found.batch, found.decay, found.max_length) == (16, False, 128)
    assert {c.method for c in cells.cells("2")} >= {"all-biases", "random-mask:100000", "full"}


def test_decoders_have_the_authors_hyperparameters():
    import cells

    theirs = rows_of(DECODERS)
    assert {c.task for c in cells.cells("5")} == set(theirs)
    for cell in [c for table in "56" for c in cells.cells(table)]:
        rate, size = theirs[cell.task]
        found, trains = cell.hyper, method(cell.method).trains
        assert found.lr == (float(rate) if trains else None)
        assert found.epochs == (5 if trains else 0) and (found.batch, found.evaluated) == (8, 1000)
        assert found.decay and found.rows == (None if size is None else int(size))
    assert {m for c in cells.cells("5") if "in-context" in (m := c.method)} == {"in-context:32"}
    assert {c.hyper.max_length for c in cells.cells("5") if c.task == "drop"} == {1536, 2048}


def test_figures_that_are_not_known_are_none():
    import cells

    known = {c for t in cells.TABLES for c in cells.cells(t) if c.figure is not None}
    sources = {cells.FIGURE, cells.NOTEBOOK, cells.SECOND_HAND}
    assert {c.figure.source for c in known} == sources and {c.model for c in known} == {cells.BERT}
    one = {(c.task, c.regime): c.figure.value for c in known if (c.table, c.method) == ("1", "key")}
    assert one[("sst2", "low")] == 77.18 and one[("stsb", "high")] == 68.7 and len(one) == 10


def test_a_table_of_an_encoder_runs_and_is_not_run_again(tiny_folder, tmp_path, data, monkeypatch):
    import run

    arguments = (tmp_path, "2", tiny_folder, "--data", str(data))
    path = paper_run(*arguments)
    found = {r["method"]: r for r in lines(path)}
    assert not [r for r in found.values() if r["failure"]]
    one, key = found["value"], found["key"]
    assert key["ran"] == "head" and key["parameters"] == one["parameters"] - 2 * 32
    assert one["stand_in"] == "tiny" and "generated" in one["data"] and one["metrics"]["accuracy"]
    assert one["authors"] == {"epochs": 30, "rows": 300, "evaluated": None}
    assert one["hyper"]["epochs"] == 1 and one["hyper"]["rows"] == 16
    mask = found["random-mask:100000"]  # as many as the tiny model has biases
    assert mask["ran"] == "random-mask:544" and mask["parameters"] < found["full"]["parameters"]
    before = path.read_bytes()
    monkeypatch.setattr(run, "_trained", lambda *_: pytest.fail("it was run again"))
    paper_run(*arguments)
    assert path.read_bytes() == before
    with pytest.raises(pytest.fail.Exception, match="run again"):  # another rate is another run
        paper_run(*arguments, "--faster", "10", "--methods", "value")
    # Table 1 has runs that table 2 has too.
    other = paper_run(tmp_path, "1", tiny_folder, "--data", str(data), "--tasks", "rte")
    reused = next(r for r in lines(other) if r["method"] == "value" and r["regime"] == "low")
    assert reused == one | {"table": "1"}


def test_lora_and_low_rank_of_one_projection(tiny_folder, tmp_path, data):
    pytest.importorskip("peft", reason="peft is not installed")
    path = paper_run(tmp_path, "4", tiny_folder, "--data", str(data))
    found = {r["method"]: r for r in lines(path)}
    assert found["low-rank:key"]["ran"] == "head"
    assert not [m for m, r in found.items() if r["failure"]]
    assert found["lora:key"]["parameters"] == found["lora:value"]["parameters"]


def test_a_table_of_a_decoder_runs(tiny_decoder, tmp_path, data):
    pytest.importorskip("peft", reason="peft is not installed")
    path = paper_run(tmp_path, "5", tiny_decoder, "--data", str(data), "--tasks", "boolq,cb")
    found = {(r["task"], r["method"]): r for r in lines(path)}
    assert found["cb", None]["failure"] == "DIR/cb/train.jsonl: no such file"
    assert not [m for (_, m), r in found.items() if r["failure"] and m]
    asked = found["boolq", "zero-shot"]["metrics"]
    assert found["boolq", "key"]["ran"] == "zero-shot" and found["boolq", "key"]["metrics"] == asked
    ran = {m for (task, m) in found if task == "boolq"}
    assert ran == {"value", "query", "key", "prefix", "lora", "in-context:32", "zero-shot"}


def test_what_cannot_be_had_says_why_and_is_tried_again(tiny_folder, tmp_path, data, monkeypatch):
    import run

    monkeypatch.setattr(run, "_without_model", lambda _: "no such model")
    path = paper_run(tmp_path, "3", tiny_folder, "--data", str(data), "--tasks", "sst2")
    assert [(r["method"], r["failure"]) for r in lines(path)] == [(None, "no such model")]
    monkeypatch.setattr(run, "_without_model", lambda _: None)
    few = paper_run(tmp_path, "3", tiny_folder, "--data", str(data), "--tasks", "sst2")
    assert {r["method"] for r in lines(few)} == {"value", "query", "key"}
    out = ["--out", str(tmp_path / "more"), "--work", str(tmp_path / "work"), "--data", str(data)]
    run.main(["--table", "3", "--model", tiny_folder, "--tasks", "sst2", *out])
    assert "it takes 1,000 training rows, the data here has 24" in (
        tmp_path / "more" / "table3.jsonl"
    ).read_text(encoding="utf-8")


def test_heatmaps_hold_every_term_and_layer(tiny_folder, tmp_path, data):
    import render
    import run

    out = ["--out", str(tmp_path), "--data", str(data), "--rows", "16", "--epochs", "1"]
    run.main(["--table", "heatmaps", "--model", tiny_folder, "--name", "tiny", *out])
    (record,) = lines(tmp_path / "heatmaps.jsonl")
    assert set(record["per_layer"]) == {"beft", "magnitude", "fisher"} and record["dead"] == ["key"]
    assert all(len(row) == 2 for rows in record["per_layer"].values() for row in rows.values())
    results = {t: [] for t in render.TABLES} | {"heatmaps": [record]}
    page = render.page(results)
    assert "paper-heatmap-tiny-beft.png" in page and "tiny in place of the model" in page


@pytest.mark.parametrize("bias_free", [False, True])
def test_a_decoder_made_from_scratch_is_one_that_a_table_takes(tmp_path, bias_free):
    import decoder

    short = ["--documents", "200", "--steps", "2", "--rows", "20"]
    folder = tmp_path / "model"
    decoder.main(["--out", str(folder), *short, *(["--bias-free"] if bias_free else [])])
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("llama" if bias_free else "opt")
    table, task = ("6", "squad") if bias_free else ("5", "copa")
    more = ["--data", str(folder / "data"), "--tasks", task, "--methods", "value,zero-shot"]
    found = lines(paper_run(tmp_path, table, str(folder), *more))
    assert [r["failure"] for r in found] == [None, None]


def test_the_generated_text_follows_from_the_seed():
    import decoder
    import grammar

    assert list(decoder.documents(20)) == list(decoder.documents(20))
    for task in grammar.MAKERS:
        made = grammar.rows(task, 60, seed=3)
        assert made == grammar.rows(task, 60, seed=3) != grammar.rows(task, 60, seed=4)
        examples = named_task(task).examples(made, task)
        if task != "squad":
            assert 10 < sum(e.label for e in examples) < 50


def test_the_results_are_of_cells_and_name_no_folder():
    import cells
    import store

    for table in cells.TABLES:
        known = {(c.model, c.task, c.regime) for c in cells.cells(table)}
        methods = {c.method for c in cells.cells(table)} | {None}
        for record in store.read(table):
            assert (record["model"], record["task"], record["regime"]) in known
            assert record["method"] in methods
            assert not re.search(r"(^|[\s'])/\w", record["failure"] or "")


def test_the_page_is_that_of_the_results():
    import render
    import store

    results = {table: store.read(table) for table in render.TABLES}
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert page == render.page(results), "run benchmarks/paper/render.py"
