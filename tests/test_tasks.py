"""Reading labelled text: four kinds of file, one-line errors, seeded subsets and orders."""

import json

import pytest
import torch

from beft_ext.tasks import Batches, Columns, DataError, load_task, read_file, subset

ROWS = [{"a": f"text {i}, with a comma", "b": f"pair {i}", "y": i % 2} for i in range(7)]
COLUMNS = Columns("a", "b", "y")


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
    found = read_file(write(tmp_path, kind), COLUMNS)
    assert found.texts == [r["a"] for r in ROWS] and found.pairs == [r["b"] for r in ROWS]
    assert found.labels == [0, 1, 0, 1, 0, 1, 0]


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
        ("x.txt", "", "unknown kind of file"),
        ("x.parquet", "PAR1", "cannot be read"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_file(path, COLUMNS)


def test_named_tasks_read_the_hubs_fields(tmp_path):
    (tmp_path / "rte").mkdir()
    row = {"sentence1": "p", "sentence2": "h", "label": 1, "idx": 0}
    (tmp_path / "rte" / "train.jsonl").write_text(json.dumps(row))
    assert load_task("rte", "train", tmp_path).pairs == ["h"]
    with pytest.raises(DataError, match="no such file"):
        load_task("rte", "validation", tmp_path)
    with pytest.raises(DataError, match="unknown task 'rtee'"):
        load_task("rtee", "train", tmp_path)


def test_subsets_are_seeded(tmp_path):
    rows = read_file(write(tmp_path, "jsonl"), COLUMNS)
    assert subset(rows, 3, 0).texts == subset(rows, 3, 0).texts
    assert subset(rows, 3, 0).texts != subset(rows, 3, 1).texts
    assert subset(rows, None, 0) is rows
    for size in (0, 8):
        with pytest.raises(DataError, match="1 to 7"):
            subset(rows, size, 0)


class Tokenizer:
    """Letters as tokens."""

    def __call__(self, *texts, truncation, max_length):
        return {"input_ids": [[ord(c) for c in t[:max_length]] for t in texts[0]]}

    def pad(self, fields, return_tensors):
        longest = max(map(len, fields["input_ids"]))
        rows = [r + [0] * (longest - len(r)) for r in fields["input_ids"]]
        return {"input_ids": torch.tensor(rows)}


def test_every_pass_has_its_own_order_that_can_be_asked_for_again(tmp_path):
    rows = read_file(write(tmp_path, "jsonl"), COLUMNS)
    batches = Batches(rows, Tokenizer(), 3, seed=0)
    passes = [torch.cat([b["input_ids"][:, 5] for b in batches]).tolist() for _ in range(3)]
    assert len({tuple(p) for p in passes}) == 3 and len({tuple(sorted(p)) for p in passes}) == 1
    batches.set_epoch(1)
    assert torch.cat([b["input_ids"][:, 5] for b in batches]).tolist() == passes[1]
