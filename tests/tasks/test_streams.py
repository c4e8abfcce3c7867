"""More rows than are held: the examples, parts and errors of a list, read as they are due."""

import json
import random
import tracemalloc
from collections import Counter
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers as hf
from conftest import tiny

from beft_ext import Recipe, TuningError, prepare, tune
from beft_ext.commands.cli import main
from beft_ext.commands.sources import Parts, Source
from beft_ext.errors import BeftWarning
from beft_ext.tasks import (
    DataError,
    HeadObjective,
    PromptObjective,
    Task,
    read_rows,
    rows as rows_module,
    streams,
    subset,
)
from beft_ext.tasks.batches import GROUP
from beft_ext.tasks.rows import Rows
from beft_ext.tasks.streams import Examples, mixed

KINDS = ("csv", "tsv", "jsonl", "parquet", "csv.gz")
COUNT = 150
WORDS = ["good", "so so", "bad", "rather, well", "dull"]
ROWS = [
    {
        "other": f"x{i}",
        "sentence": " ".join(WORDS[: 1 + i * 7 % 5]) + f" {i}",
        "label": "abc"[i % 3],
    }
    for i in range(COUNT)
]


def write(folder, kind="csv", rows=ROWS):
    path = folder / f"train.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        mark = "\t" if kind == "tsv" else ","
        cells = [list(rows[0]), *(row.values() for row in rows)]
        quoted = (f'"{c}"' if mark in str(c) else str(c) for row in cells for c in row)
        text = "".join(mark.join(islice(quoted, len(rows[0]))) + "\n" for _ in cells)
    data = text.encode()
    if kind.endswith("gz"):
        import gzip

        data = gzip.compress(data)
    path.write_bytes(data)
    return path


@pytest.fixture
def few_are_held(monkeypatch):
    """Rows stream from the 21st on, through a buffer of 16."""
    monkeypatch.setattr(rows_module, "HELD", 20)
    monkeypatch.setattr(streams, "HELD", 20)
    monkeypatch.setattr(streams, "BUFFER", 16)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return hf.AutoTokenizer.from_pretrained(tiny_folder)


def listed(path):
    """The examples of all rows, by the reader and the task alone."""
    task = Task(text="{sentence}").with_classes_of(read_rows(path), str(path))
    return task.examples(read_rows(path), str(path))


def streamed(tokenizer, path, size=4, seed=0, by_length=True):
    source = Source(train_file=path)
    objective = HeadObjective(source.task, tokenizer)
    return objective.training(source.training(), size, seed, by_length)


def drawn(stream):
    """Numbers of the rows of each batch of the next pass."""
    return [[i for i, _ in batch] for window in stream._windows(stream._passes) for batch in window]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_the_examples_of_a_list(few_are_held, tmp_path, kind):
    path = write(tmp_path, kind)
    found = Source(train_file=path).training()
    assert isinstance(found, Examples)
    assert list(found) == list(found) == listed(path) and len(found) == COUNT
    assert found.labels.tolist() == [e.label for e in found]


def test_rows_of_a_stream_say_what_they_have_in_common(few_are_held, tokenizer, tmp_path):
    rows = [row | {"other": f"user {i % 5}"} for i, row in enumerate(ROWS)]
    source = Source(train_file=write(tmp_path, rows=rows), group="other")
    loader = HeadObjective(source.task, tokenizer).training(source.training(), 4, seed=0)
    order = [i for batch in drawn(loader) for i in batch]
    assert loader.grouped == GROUP and GROUP not in next(iter(loader))
    loader.set_epoch(0)
    found = torch.cat([batch[GROUP] for batch in loader.with_groups()]).tolist()
    number = dict(zip((i % 5 for i in order), found, strict=True))
    assert len(set(number.values())) == 5 and found == [number[i % 5] for i in order]


def test_few_rows_are_a_list(tmp_path):
    assert isinstance(Source(train_file=write(tmp_path)).training(), list)


def test_long_rows_are_held_in_smaller_number(monkeypatch, tmp_path):
    monkeypatch.setattr(rows_module, "HELD_TEXT", 1000)
    assert isinstance(Source(train_file=write(tmp_path)).training(), Examples)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_columns_that_are_needed_are_cut(few_are_held, tmp_path, kind):
    rows = Rows.of(write(tmp_path, kind))
    found = next(rows.numbered(("label",)))
    assert found[0] == 1 and found[1]["label"] == "a"
    if kind != "jsonl":
        assert list(found[1]) == ["label"]
    nested = write(tmp_path, kind, [{"a": '{"b": "x"}', "b": "y"}] * 30)
    assert next(Rows.of(nested).numbered(("a.b",)))[1]["a"] == '{"b": "x"}'
    # A message lists every column.
    with pytest.raises(DataError, match=r"row 1: no column 'c'; it has a, b$"):
        list(Source(train_file=nested, text="a", label="c").training())


@pytest.mark.parametrize("size", [1, 7, 20, 21, 149, 150])
@pytest.mark.parametrize("seed", [0, 3])
def test_a_subset_is_that_of_a_list(few_are_held, monkeypatch, tmp_path, size, seed):
    path = write(tmp_path)
    expected = subset(listed(path), size, seed)
    for piece in (50, 2**20):
        monkeypatch.setattr(rows_module, "PIECE", piece)
        found = Source(train_file=path).training().subset(size, seed)
        if size > 20:  # in the file's order
            assert len(found) == size and Counter(found) == Counter(expected)
        else:
            assert found == expected
    with pytest.raises(DataError, match="--train-size 151 must be 1 to 150"):
        Source(train_file=path).training().subset(151, seed)


def test_parts_are_those_of_rows_that_are_held(monkeypatch, tmp_path):
    path, parts = write(tmp_path), Parts(validation=0.1, test=0.2, seed=5)

    def found():
        source = Source(train_file=path, parts=parts)
        return [list(source.training()), source.read("validation"), source.read("test")]

    held = found()
    monkeypatch.setattr(rows_module, "HELD", 20)
    assert found() == held and [len(part) for part in held] == [105, 15, 30]
    own = Source(train_file=path, validation_file=path, parts=Parts(validation_size=9))
    assert own.read("validation") == subset(listed(path), 9, 0)


def test_every_pass_has_every_row_once_in_an_order_of_its_own(few_are_held, tokenizer, tmp_path):
    stream = streamed(tokenizer, write(tmp_path))
    orders = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        orders.append(drawn(stream))
        assert sorted(i for batch in orders[-1] for i in batch) == list(range(COUNT))
        assert len(orders[-1]) == len(stream) == len(list(stream)) == 38
    assert len({str(order) for order in orders}) == 3
    stream.set_epoch(1)
    assert drawn(stream) == orders[1] != drawn(streamed(tokenizer, write(tmp_path), seed=1))


@pytest.mark.parametrize("piece", [1, 64, 1000])
def test_how_much_is_read_at_a_time_changes_no_batch(
    few_are_held, monkeypatch, tokenizer, tmp_path, piece
):
    path = write(tmp_path)
    whole = list(streamed(tokenizer, path))
    monkeypatch.setattr(rows_module, "PIECE", piece)
    for one, other in zip(whole, streamed(tokenizer, path), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_batches_hold_the_rows_and_pad_little(few_are_held, tokenizer, tmp_path):
    path = write(tmp_path)
    plain, sorted_ = (streamed(tokenizer, path, 4, 0, by_length) for by_length in (False, True))
    labels = [e.label for e in listed(path)]
    for stream in (plain, sorted_):
        batches = drawn(stream)
        for numbers, batch in zip(batches, stream, strict=True):
            assert batch["labels"].tolist() == [labels[i] for i in numbers]
    sizes = [sum(b["input_ids"].numel() for b in stream) for stream in (plain, sorted_)]
    assert sizes[1] < 0.9 * sizes[0]


def test_the_first_batch_comes_before_the_end(few_are_held, tokenizer):
    read = 0

    def rows(columns):
        nonlocal read
        for row in ROWS * 100:
            read += 1
            yield row

    task = Task(text="{sentence}", classes=("a", "b", "c"))
    stream = HeadObjective(task, tokenizer).training(
        Examples(task, Rows("here", rows, str)), size=2, seed=0
    )
    next(iter(stream))
    assert read < 100


def test_a_pass_holds_a_buffer_alone(few_are_held, monkeypatch, tokenizer, tmp_path):
    """Eight times the rows: the same peak of what Python holds."""
    monkeypatch.setattr(rows_module, "PIECE", 2**13)
    peaks = []
    for times in (10, 80):
        stream = streamed(tokenizer, write(tmp_path, "csv", ROWS * times))
        next(iter(stream))
        tracemalloc.start()
        assert sum(1 for _ in stream) == -(-COUNT * times // 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0], peaks


@pytest.mark.parametrize("room", [1, 5, 100])
def test_mixed_items_are_each_there_once_and_near_their_place(room):
    found = list(mixed(range(50), room, random.Random(0)))
    assert sorted(found) == list(range(50))
    assert all(place >= item - room for place, item in enumerate(found))
    assert room == 1 or found != list(range(50))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_bad_cell_is_told_with_its_row(few_are_held, tokenizer, tmp_path, kind):
    rows = [*ROWS]
    rows[90] = rows[90] | {"sentence": None}
    path = write(tmp_path, kind, rows)
    with pytest.raises(DataError, match=r"train.*, row 91: column 'sentence' has no value"):
        list(streamed(tokenizer, path))
    rows[80] = rows[80] | {"label": None}
    for parts in (Parts(), Parts(test=0.2)):  # rows count in the file, whatever is drawn
        source = Source(train_file=write(tmp_path, kind, rows), parts=parts)
        with pytest.raises(DataError, match=r"train.*, row 81: column 'label' has no value"):
            _ = source.task


def test_a_row_that_does_not_fit_is_told(few_are_held, tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text() + "a,b\n")
    with pytest.raises(DataError, match="row 151 does not fit the header: it has 2 cells, not 3"):
        _ = Source(train_file=path).task


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_divide_every_batch(few_are_held, tokenizer, tmp_path, ranks):
    stream = streamed(tokenizer, write(tmp_path), size=5)
    parts = [stream.shared(rank, ranks) for rank in range(ranks)]
    for epoch in range(2):
        own = [part.own(epoch) for part in parts]
        stream.set_epoch(epoch)
        assert sorted(i for numbers in own for i in numbers) == list(range(COUNT))
        for part in parts:
            part.set_epoch(epoch)
        for batch, step in zip(stream, zip(*parts, strict=True), strict=True):
            labels = [y for part in step if part for y in part["labels"].tolist()]
            assert labels == batch["labels"].tolist()
    assert stream.digest() == parts[1].digest()
    assert stream.digest() != streamed(tokenizer, write(tmp_path, rows=ROWS[:-1]), 5).digest()


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [20, 38, 50])
def test_a_resumed_run_ends_in_the_same_bits(few_are_held, tokenizer, tmp_path, stop):
    path, recipe = write(tmp_path), Recipe(epochs=2, lr=1e-2)

    def prepared():
        model = tiny("bert")
        prepare(model, "value")
        return model

    def run(folder, stop=None, resume=False):
        stream, model = streamed(tokenizer, path), prepared()
        left = [stop]

        def taken(done, of):
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed

        stream.taken = taken
        # Its own ids are beyond the tiny model's vocabulary.
        collate = stream.collate
        stream.collate = lambda rows: {
            k: v % 60 if k == "input_ids" else v % 2 if k == "labels" else v
            for k, v in collate(rows).items()
        }
        tune(model, stream, None, folder, recipe, resume=resume, save_every=8)
        return [p.detach().clone() for p in model.parameters()]

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "again", stop)
    assert all(map(torch.equal, whole, run(tmp_path / "again", resume=True)))
    write(tmp_path, rows=[*ROWS[:5], ROWS[5] | {"sentence": "another"}, *ROWS[6:]])
    with pytest.raises(TuningError, match="a run on other data"):
        run(tmp_path / "again", resume=True)


def test_an_order_by_class_is_warned_of(few_are_held, tokenizer, tmp_path):
    rows = sorted(ROWS, key=lambda row: row["label"])
    with pytest.warns(BeftWarning, match="first 16 training rows all have the same label"):
        next(iter(streamed(tokenizer, write(tmp_path, rows=rows))))


def test_rows_at_hand_are_drawn_from_all(few_are_held, tokenizer, tmp_path):
    stream = streamed(tokenizer, write(tmp_path))
    assert len(stream.few(3)) == 3
    drawn = stream.at_hand()
    assert len(drawn.rows) == 16 and len({row.label for row in drawn.rows}) == 3
    assert drawn.size == 4 and sum(len(b["labels"]) for b in drawn) == 16


def test_prompts_stream_with_options_of_each_row(few_are_held, tiny_decoder):
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_decoder)
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_decoder)
    task = Task(text="{q}", kind="choice", prompt="{q} is", options="says", label="right")
    rows = [
        {"q": f"{i}", "says": ["Yes", "No", "Maybe"][: 2 + i % 2], "right": 0} for i in range(60)
    ]
    every = Examples(task, Rows("here", lambda columns: iter(rows), str))
    stream = PromptObjective(task, tokenizer, model).training(every, 8, seed=0)
    batches = list(stream)
    assert len(batches) == len(stream) == 8
    assert Counter(b["options"].shape[1] for b in batches) == {2: 4, 3: 4}
    held = PromptObjective(task, tokenizer, model).training(list(every), 8, seed=0)
    assert sum(b["labels"].numel() for b in batches) == sum(b["labels"].numel() for b in held) == 60


def test_answers_that_are_too_long_leave_their_rows_out(few_are_held, tiny_decoder):
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_decoder)
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_decoder)
    task = Task(text="{q}", kind="generation", prompt="{q}", answers="a")
    rows = [{"q": f"{i}", "a": "a" * (60 if i % 10 == 0 else 3)} for i in range(60)]
    every = Examples(task, Rows("here", lambda columns: iter(rows), str))
    asked = PromptObjective(task, tokenizer, model, max_length=40)
    stream = asked.training(every, 8, seed=0)
    for _ in range(2):  # the count is of one pass
        assert sum(len(b["labels"]) for b in stream) == 54
        assert asked.notes == {"examples left out: the answer is longer than the model's input": 6}
    rows = [row | {"a": "a" * 60} for row in rows]
    with pytest.raises(DataError, match="no example is left"):
        list(asked.training(every, 8, seed=0))


def test_the_command_line_selects_races_and_trains(few_are_held, tiny_folder, tmp_path, capsys):
    path = write(tmp_path)
    given = ["--model", tiny_folder, "--train-file", str(path), "--validation-size", "15"]
    select = ["select", *given, "--steps", "3", "--out", str(tmp_path / "s")]
    assert main(select) == 0
    assert json.loads((tmp_path / "s" / "selection.json").read_text())["steps"] == 3
    own = ["--epochs", "1", "--lr", "auto", "--batch-size", "8", "--max-length", "9"]
    own += ["--audition-budget", "6"]
    assert main(["tune", *given, *own, "--out", str(tmp_path / "t")]) == 0
    told = capsys.readouterr()
    assert (
        "135 training and 15 validation rows"
        in (tmp_path / "t" / "adapter" / "README.md").read_text()
    )
    assert "won at" in told.out and "note: " in told.err
    (record,) = (tmp_path / "t" / "log.jsonl").read_text().splitlines()
    assert json.loads(record)["step"] == 17
    few = ["--train-size", "10", "--terms", "value", "--epochs", "1"]
    assert main(["tune", *given, *few, "--out", str(tmp_path / "f")]) == 0
