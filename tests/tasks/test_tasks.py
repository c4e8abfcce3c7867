"""Reading labelled text and what it means: files, labels, one-line errors, orders, metrics."""

import json

import pytest
import torch

from beft_ext.tasks import Batches, DataError, Task, load_task, read_rows, read_task, subset
from beft_ext.tasks.batches import Encoded, padded
from beft_ext.tasks.metrics import measure

ROWS = [{"a": f"text {i}, with a comma", "b": f"pair {i}", "y": i % 2} for i in range(7)]
TASK = Task(text="{a}", pair="{b}", label="y")


def examples(path):
    return TASK.examples(read_rows(path), str(path))


def write(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n\n")
    elif kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join(ROWS[0])]
        lines += [mark.join(f'"{v}"' for v in r.values()) for r in ROWS]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_kind_of_file_reads_the_same(tmp_path, kind):
    found = examples(write(tmp_path, kind))
    assert [(e.text, e.pair) for e in found] == [(r["a"], r["b"]) for r in ROWS]
    assert [e.label for e in found] == [0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": "t", "b": "u", "y": "good"}', "not a class number"),
        ("x.jsonl", '{"a": "t", "b": "u", "y": 0.5}', "not a class number"),
        ("x.jsonl", '{"a": "t", "b": "u", "y": -1}', "not a class number"),
        ("x.jsonl", '{"a": "t", "y": 1}', "row 1: no column 'b'; it has a, y"),
        ("x.jsonl", "[1]", "not an object"),
        ("x.jsonl", "\xff\xfe", "cannot be read"),
        ("x.csv", "", "no rows"),
        ("x.csv", "a,b,y\nt,u", "row 1 does not fit the header: it has 2 cells, not 3$"),
        ("x.jsonl", '{"a": null, "b": "u", "y": 1}', "row 1: column 'a' has no value"),
        ("x.jsonl", '{"a": "t", "b": "u", "y": NaN}', "not a class number"),
        ("x.jsonl", '{"a": "t", "b": "u", "y": Infinity}', "not a class number"),
        ("x.txt", "", "unknown kind of file"),
        ("x.parquet", "PAR1", "cannot be read"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        examples(path)


def test_named_tasks_read_the_hubs_fields(tmp_path):
    (tmp_path / "rte").mkdir()
    row = {"sentence1": "p", "sentence2": "h", "label": 1, "idx": 0}
    (tmp_path / "rte" / "train.jsonl").write_text(json.dumps(row))
    (found,) = load_task("rte", "train", tmp_path)
    assert found.pair == "h" and found.options == ("Yes", "No") and found.right == (1,)
    assert found.prompt == 'p\nDoes this mean that "h" is true? Yes or No?\n'
    with pytest.raises(DataError, match=r"validation\.jsonl: no such file"):
        load_task("rte", "validation", tmp_path)
    with pytest.raises(DataError, match="unknown task 'rtee'"):
        load_task("rtee", "train", tmp_path)
    (tmp_path / "rte" / "test.jsonl").write_text(json.dumps(row | {"label": 2}))
    with pytest.raises(DataError, match=r"row 1: label '2' is outside the 2 options"):
        load_task("rte", "test", tmp_path)


def test_every_kind_of_task_has_its_own_metric():
    assert Task(text="").metrics == ("accuracy",)
    assert Task(text="", kind="regression").metric == "pearson"
    assert Task(text="", kind="generation", answers="a").metric == "exact_match"


def test_a_template_that_is_none_is_named():
    for template in ("{a", "{}", "a}", "{a{b}}"):
        with pytest.raises(DataError, match=r"^template '\{?a?"):
            Task(text=template)


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b,y\nt,u,1\n")
    assert examples(path)[0].text == "t"


def test_subsets_are_seeded(tmp_path):
    rows = examples(write(tmp_path, "jsonl"))
    assert subset(rows, 3, 0) == subset(rows, 3, 0) != subset(rows, 3, 1)
    assert subset(rows, None, 0) == rows
    for size, seed in ((1, 0), (3, 1), (7, 2)):
        assert len({e.text for e in subset(rows, size, seed)}) == size
    for size in (0, 8):
        with pytest.raises(DataError, match="1 to 7"):
            subset(rows, size, 0)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"text": "{a}", "kind": "choise"}', "unknown kind of task 'choise'"),
        ('{"text": "{a}", "kind": "choice"}', "needs 'options'"),
        ('{"text": "{a}", "kind": "generation"}', "needs 'answers'"),
        ('{"text": "{a}", "metrics": ["acc"]}', "unknown metric 'acc'"),
        ('{"text": "{a}", "metrics": ["pearson"]}', "'pearson' does not suit a classification"),
        ('{"text": 3}', "'text' must be a text"),
        ('{"text": "{a}", "label": 3}', "'label' must be a text"),
        ('{"text": "{a}", "options": [0, 1]}', "'options' must be a list of texts"),
        ('{"text": "{a}", "metrics": "accuracy"}', "must be a list"),
        ('{"text": "{a}", "reshape": "x"}', "unknown key 'reshape'"),
        ('{"prompt": "{a}"}', 'at least "text"'),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON .it is nested too deeply"),
        ('{"text": "{a}", "text": "{b}"}', "column 'text' is there twice"),
        ('{"text": "{a", "label": "b"}', "task.json: template '{a': a brace without its other"),
        ('{"text": "{a}", "hub": ["a", "b"]}', "unknown key 'hub'"),
        ('{"text": "\xff"}', "line 1 is not UTF-8"),
    ],
)
def test_a_task_of_ones_own_is_checked(tmp_path, written, message):
    path = tmp_path / "task.json"
    path.write_bytes(written.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_task(path)
    with pytest.raises(DataError, match=r"^[^\n]*: cannot be read as JSON"):
        read_task(tmp_path)


def test_a_task_of_ones_own_names_classes_and_columns(tmp_path):
    path = tmp_path / "task.json"
    path.write_text('{"text": "{a}", "label": "mood", "classes": ["bad", "good"], "prompt": "{z}"}')
    task = read_task(path)
    assert task.examples([{"a": "t", "z": "", "mood": "good"}], "here")[0].label == 1
    with pytest.raises(DataError, match="here, row 1: no column 'z'; it has a, mood"):
        task.examples([{"a": "t", "mood": "good"}], "here")


def rows_of(lengths, parts=1):
    return [Encoded([i] * n, 0.0, n, parts) for i, n in enumerate(lengths)]


def collate(rows):
    return {"input_ids": padded([r.fields for r in rows], -1)}


def seen(batches):
    return [int(row[0]) for b in batches for row in b["input_ids"]]


def test_every_pass_has_its_own_order_that_can_be_asked_for_again():
    batches = Batches(rows_of([2] * 7), collate, 3, seed=0)
    passes = [seen(batches) for _ in range(3)]
    assert len({tuple(p) for p in passes}) == 3 and len({tuple(sorted(p)) for p in passes}) == 1
    batches.set_epoch(1)
    assert seen(batches) == passes[1]


def test_batches_by_length_hold_every_row_once_and_pad_less():
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for seed in range(3):
        plain, sorted_ = (Batches(rows_of(lengths), collate, 8, seed, b) for b in (False, True))
        sizes = [sum(b["input_ids"].numel() for b in x) for x in (plain, sorted_)]
        assert sizes[1] < 0.75 * sizes[0]
        assert sorted(seen(sorted_)) == list(range(200)) and len(list(sorted_)) == len(sorted_)


def test_a_batch_holds_examples_of_as_many_parts():
    rows = [*rows_of([3] * 5, 2), *rows_of([3] * 6, 4)]
    batches = Batches(rows, collate, 4, seed=0)
    plans = batches.plan()
    assert len(plans) == len(batches) == 4
    assert all(len({rows[i].parts for i in plan}) == 1 for plan in plans)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("by_length", [False, True])
def test_ranks_share_every_batch_in_its_order(ranks, by_length):
    batches = Batches(rows_of(range(1, 18)), collate, 4, seed=0, by_length=by_length)
    parts = [batches.shared(rank, ranks) for rank in range(ranks)]
    for epoch in range(2):
        for loader in (batches, *parts):
            loader.set_epoch(epoch)
        for indices, step in zip(batches.plan(), zip(*parts, strict=True), strict=True):
            own = [[int(row[0]) for row in part.get("input_ids", ())] for part in step]
            assert [i for rows in own for i in rows] == indices
            assert max(map(len, own)) - min(map(len, own)) <= 1 and own[0]
    rows = [part.own(epoch=0) for part in parts]
    assert sorted(i for own in rows for i in own) == list(range(17))
    assert [part.examples for part in parts] == list(map(len, rows))


def test_a_part_has_its_rows_alone_and_keeps_size_and_order():
    batches = Batches(rows_of([2, 5, 3, 4, 1]), collate, 2, seed=0)
    part = batches.part([3, 0, 4], seed=7)
    assert sorted(seen(part)) == [0, 3, 4] and len(part) == 2
    part.set_epoch(0)
    assert seen(part) == [[3, 0, 4][i] for plan in batches.part([3, 0, 4], 7).plan() for i in plan]
    assert seen(batches.part([3, 0, 4])) == [3, 0, 4]  # without a seed from long to short
    assert sorted(seen(batches)) == [0, 1, 2, 3, 4]


def scored(metric, predictions, labels):
    kind = "regression" if metric in ("pearson", "spearman") else "classification"
    task = Task(text="", kind=kind, metrics=(metric,))
    return measure([metric], predictions, task.examples([{"label": x} for x in labels], ""))[metric]


def test_metrics_against_their_formulas():
    right, said = [0, 1, 1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 0, 1, 0]
    tp, fp, fn, tn = 3, 1, 1, 3
    assert scored("accuracy", said, right) == 6 / 8
    assert scored("f1", said, right) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert scored("matthews", said, right) == pytest.approx((tp * tn - fp * fn) / root)
    three = [0, 1, 2, 2], [0, 2, 2, 2]  # F1 by class: 1, 0, 0.8
    assert scored("f1_macro", three[1], three[0]) == pytest.approx(1.8 / 3)
    biased = [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]  # tp 3, fp 2, fn 0, tn 1
    assert scored("matthews", biased[1], biased[0]) == pytest.approx(3 / (5 * 3 * 3 * 1) ** 0.5)
    x, y = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert scored("pearson", x.tolist(), y.tolist()) == pytest.approx(expected)
    ranks = torch.stack([v.argsort().argsort().double() for v in (x, y)])
    expected = float(torch.corrcoef(ranks)[0, 1])
    assert scored("spearman", x.tolist(), y.tolist()) == pytest.approx(expected)
    assert scored("spearman", [1.0, 1.0], [0.0, 2.0]) == 0.0
    assert scored("pearson", [0.0, 2.0], [1.0, 1.0]) == 0.0


def test_answers_are_compared_as_squad_does():
    task = Task(text="", kind="generation", answers="a", metrics=("exact_match", "token_f1"))
    scores = {  # by answers and what was said: exact match, and F1 of the words
        (("The Eiffel Tower!", "Paris"), "an eiffel  tower"): (1, 1),
        (("Paris", "The Eiffel Tower!"), "eiffel tower"): (1, 1),
        (("in nineteen ninety",), "nineteen"): (0, 2 * 1 / (1 + 3)),
        (("ha ha ho",), "ha ha ha"): (0, 2 * 2 / (3 + 3)),
        (("x",), ""): (0, 0),
        (("the",), "A."): (1, 1),
    }
    for (answers, said), (exact, f1) in scores.items():
        found = measure(task.metrics, [said], task.examples([{"a": answers}], ""))
        assert found == pytest.approx({"exact_match": exact, "token_f1": f1})
    rows = [{"a": answers} for answers, _ in scores]
    found = measure(task.metrics, [said for _, said in scores], task.examples(rows, ""))
    assert found["exact_match"] == pytest.approx(3 / 6)
