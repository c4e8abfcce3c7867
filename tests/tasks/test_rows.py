"""The same rows mean the same in every kind of file; a damaged file is one line with its name."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import sys
import types

import pytest
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st

from beft_ext.tasks import DataError, Task, load_task, read_rows
from beft_ext.tasks.rows import hub_rows, iterate_rows

pyarrow = pytest.importorskip("pyarrow", reason="csv, tsv, parquet and zst need pyarrow")
parquet_files = pytest.importorskip("pyarrow.parquet")

TASK = Task(text="{a}", label="y")
QUICK = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAMES = ["NA", "None", "null", "nan", "", "01", "1.0", "true", " x ", "\ufeffx", '"', '""', "[1]"]
CHARACTERS = st.sampled_from("\"'\t\n\r, ab\\é日😀\ufeff\u2028\x85\0{}[]")
TEXTS = st.sampled_from(NAMES) | st.text(CHARACTERS, max_size=8)
FORMS = [int, float, str, lambda c: f"{c}.0", bool, lambda c: str(bool(c)).lower(), "+{}".format]
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def separated(rows, **dialect):
    file = io.StringIO(newline="")
    writer = csv.writer(file, **dialect)
    writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    return file.getvalue().encode()


def parquet(rows):
    file = io.BytesIO()
    parquet_files.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


WRITERS = {
    "csv": separated,
    "tsv": lambda rows: separated(rows, delimiter="\t", quoting=csv.QUOTE_ALL),
    "json": lambda rows: b"\n " + json.dumps(rows, indent=1).encode(),
    "jsonl": lambda rows: "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode(),
    "parquet": parquet,
}


def read(folder, name, data, task=TASK):
    path = folder / name
    path.write_bytes(data)
    return task.examples(read_rows(path), str(path))


@QUICK
@given(st.lists(TEXTS | st.just("a\u2028b\x85c"), min_size=1, max_size=4), st.data())
def test_the_same_rows_give_the_same_examples_in_every_kind(tmp_path, texts, data):
    form = data.draw(st.sampled_from(FORMS))
    classes = [data.draw(st.integers(0, 1)) for _ in texts]
    rows = [{"a": t, "y": form(c)} for t, c in zip(texts, classes, strict=True)]
    for kind, writer in WRITERS.items():
        packed = data.draw(st.sampled_from(list(PACKERS)))
        mark = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) if kind != "parquet" else b""
        found = read(tmp_path, f"x.{kind}{packed}", PACKERS[packed](mark + writer(rows)))
        assert [(e.text, e.label, e.right) for e in found] == [
            (t, c, (c,)) for t, c in zip(texts, classes, strict=True)
        ]


@QUICK
@given(st.lists(st.sampled_from(NAMES), min_size=2, max_size=6), st.data())
def test_classes_are_the_same_in_every_kind(tmp_path, names, data):
    """Whatever the labels look like: the same classes, or the same refusal."""
    found = set()
    for kind, writer in WRITERS.items():
        path = tmp_path / f"x.{kind}{data.draw(st.sampled_from(list(PACKERS)))}"
        path.write_bytes(PACKERS[path.suffix if path.suffix in PACKERS else ""](
            writer([{"a": "t", "y": n} for n in names])))  # fmt: skip
        try:
            found.add(TASK.with_classes_of(read_rows(path), "x").classes)
        except DataError as error:
            found.add(str(error))
    assert len(found) == 1


@QUICK
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_targets_of_a_regression_are_the_same_in_every_kind(tmp_path, targets):
    task = Task(text="{a}", label="y", kind="regression")
    rows = [{"a": "t", "y": y} for y in targets]
    for kind, writer in WRITERS.items():
        found = read(tmp_path, f"x.{kind}", writer(rows), task)
        assert [e.label for e in found] == targets and all(e.right == () for e in found)


def test_a_float32_is_the_number_that_was_written(tmp_path):
    table = pyarrow.table({"a": pyarrow.array([0.1, 3.8], pyarrow.float32()), "y": [0, 1]})
    parquet_files.write_table(table, tmp_path / "x.parquet")
    assert [e.text for e in TASK.examples(read_rows(tmp_path / "x.parquet"), "")] == ["0.1", "3.8"]


def test_lists_and_objects_are_the_same_as_texts(tmp_path):
    choice = Task(text="{a}", kind="choice", options="of.c", label="y")
    answer = Task(text="{a}", kind="generation", answers="of.c")
    rows = [{"a": "t", "of": {"c": ["x, y", 'z"']}, "y": [1]}]
    written = [{k: v if k == "a" else json.dumps(v) for k, v in row.items()} for row in rows]
    for kind, writer in WRITERS.items():
        for data in (writer(written), *([writer(rows)] if "sv" not in kind else [])):
            (found,) = read(tmp_path, f"x.{kind}", data, choice)
            assert found.options == ("x, y", 'z"') and found.right == (1,)
            (found,) = read(tmp_path, f"x.{kind}", data, answer)
            assert found.answers == ("x, y", 'z"')


@QUICK
@example(["\tb", "fine"])
@example(['say ""'])
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_tabs_quoted_only_where_needed_are_quoted(tmp_path, texts):
    """Which they show: without quoting rows would not fit, or a quote is doubled in quotes."""
    assume(not any("\t" in t and ("\n" in t or "\r" in t) for t in texts))
    rows = [{"a": t, "y": 1} for t in texts]
    found = read(tmp_path, "x.tsv", separated(rows, delimiter="\t"))
    assert [e.text for e in found] == texts


@QUICK
@given(st.lists(st.text("\"', ab", max_size=6), max_size=4), st.integers(0, 4))
def test_one_open_quote_shows_that_tabs_have_no_quoting(tmp_path, texts, place):
    texts.insert(place, '"so it begins')
    lines = ["a\ty", *(f"{t}\t{i % 2}" for i, t in enumerate(texts))]
    for end in ("\n", "\r\n"):
        found = read(tmp_path, "x.tsv", end.join(lines).encode())
        assert [e.text for e in found] == texts


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('a\ty\n"Great"\t1\nfine\t0\n', ['"Great"', "fine"]),  # no writer quotes this one alone
        ('a\ty\n"Great"\t1\n"Bad"\t0\n', ["Great", "Bad"]),  # the whole column
        ('"a"\t"y"\n"Great"\t1\nfine\t0\n', ["Great", "fine"]),  # the header
        ('a\ty\n"Great"\t1\n', ['"Great"']),
        ('a\ty\n"one\t1\ntwo\t0\nthree"\t1\n', ['"one', "two", 'three"']),
        ('a\ty\n"one\ttwo"\t1\n"Great"\t0\n', ["one\ttwo", "Great"]),
        ('a\ty\n"he ""x"""\t1\nfine\t0\n', ['he "x"', "fine"]),
        ('a\ty\n""\t1\nfine\t0\n', ['""', "fine"]),
    ],
)
def test_what_shows_that_tabs_are_quoted(tmp_path, written, expected):
    assert [e.text for e in read(tmp_path, "x.tsv", written.encode())] == expected


def test_quotes_within_a_cell_of_commas_are_texts(tmp_path):
    found = read(tmp_path, "x.csv", b'a,y\nsay "hi",1\n"x, ""y""",0\n5" disk,1\n')
    assert [e.text for e in found] == ['say "hi"', 'x, "y"', '5" disk']


def test_names_that_are_numbers_make_no_numbers_of_a_column(tmp_path):
    task = Task(text="{0} {1}", label="2")
    for kind, mark in (("csv", ","), ("tsv", "\t")):
        lines = [mark.join(cells) for cells in ("012", ("01", "1.0", "1"), ("1e3", "", "0"))]
        found = read(tmp_path, f"x.{kind}", "\n".join(lines).encode(), task)
        assert [(e.text, e.label) for e in found] == [("01 1.0", 1), ("1e3 ", 0)]


def test_lines_of_json_end_where_json_says(tmp_path):
    found = read(tmp_path, "x.jsonl", '{"a": "u\u2028v\x85w", "y": 1}\r\n\r\n'.encode())
    assert [e.text for e in found] == ["u\u2028v\x85w"]


def test_suffixes_may_be_in_capitals(tmp_path):
    assert read(tmp_path, "v1.2.X.CSV.GZ", gzip.compress(b"a,y\nt,1\n"))[0].text == "t"


def test_columns_without_a_name_may_be_many(tmp_path):
    assert read(tmp_path, "x.csv", b"a,y,,\nt,1,,\n")[0].text == "t"


def test_cells_may_be_long_and_blank_lines_are_no_rows(tmp_path):
    long = "x, " * 700_000
    found = read(tmp_path, "x.csv", f'\n\na,y\n\n"{long}",1\n\n{"y" * 200_000},0'.encode())
    assert [len(e.text) for e in found] == [2_100_000, 200_000]


def test_odd_names_of_columns_are_reached(tmp_path):
    names = ["a.b", "0", "c:>9", "d{e}", "f[0]", "g!r", "__class__", 'h "i"', "j,k"]
    task = Task(text="|".join("{" + n.replace("{", "{{").replace("}", "}}") + "}" for n in names))
    rows = [{n: f"<{n}>" for n in names} | {"label": 1}]
    for kind, writer in WRITERS.items():
        (found,) = read(tmp_path, f"x.{kind}", writer(rows), task)
        assert found.text == "|".join(f"<{n}>" for n in names)


DEEP = b"[" * 100_000 + b"]" * 100_000
BROKEN = [
    ("x.csv", b"a,y\nx,1\nGood, but long,1\n", "row 2 does not fit the header: it has 3 cells"),
    ("x.csv", b"a;y\nx;1\n", "row 1: no column 'a'; it has a;y: semicolons stand between its col"),
    ("x.csv", b"a\ty\nx\t1\n", "row 1: no column 'a'; it has a.ty: tabs stand between its columns"),
    ("x.csv", b"a;y\nx;1\nx, y;1\n", "it has 2 cells, not 1: semicolons stand between its columns"),
    ("x.csv", b"a,y\nx,1\n\nx\n", "row 2 does not fit the header: it has 1 cells, not 2$"),
    ("x.tsv", b"a\ty\nx\t1\ny\t1\t\n", "row 2 does not fit the header: it has 3 cells, not 2$"),
    ("x.tsv", b'a\ty\n"x\t1\ny\n', "row 2 does not fit the header"),
    ("x.tsv", b'"a"\t"y"\n"x"\t1\n"y\tz"\n', "row 2 does not fit the header"),
    ("x.tsv", b'a\ty\n"x\ty"\t1\nsay "hi"\t0\n', "row 1 does not fit the header: it has 3"),
    ("x.csv", b'a,y\nx,1\n"I loved it,1\nbad,0\n', "row 2: a cell begins with a quote"),
    ("x.csv", b'a,y\n\n"I loved it,1\na "good" film,0\n', "row 1: a cell begins with a quote"),
    ("x.csv", b'a,y\n"x"yz,1\n', "row 1: a cell begins with a quote"),
    ("x.csv", b'a,"y\nx,1\n', "the header: a cell begins with a quote"),
    ("x.csv", b"a,a,y\nx,y,1\n", "column 'a' is there twice"),
    ("x.tsv", b"a\ta\ty\nx\ty\t1\n", "column 'a' is there twice"),
    ("x.jsonl", b'{"a": "x", "y": 1}\n\n{"a": "x", "y": 1, "a": "z"}', "row 2: column 'a' is th"),
    ("x.json", b'[{"a": "x", "a": "z"}]', "column 'a' is there twice"),
    ("x.csv", "a,y\nx,1\né,1\n".encode("latin-1"), "line 3 is not UTF-8"),
    ("x.jsonl", '{"a": "é", "y": 1}'.encode("utf-16"), "line 1 is not UTF-8"),
    ("x.csv", "a,y\nx,1\n".encode("utf-16-le"), "its header holds NUL"),
    ("x.csv", b"", "there are no rows"),
    ("x.csv", b"\r\n\n", "there are no rows"),
    ("x.csv", b"a,y", "there are no rows"),
    ("x.tsv", b"a\ty\n\n", "there are no rows"),
    ("x.json", b"[]", "there are no rows"),
    ("x.jsonl", b" \n", "there are no rows"),
    ("x.jsonl", b'{"a": "x", "y": 1}\n\n{"a": ', "row 2: Expecting value"),
    ("x.jsonl", b'{"a": "x", "y": 1}\n7', "row 2 is not an object"),
    ("x.json", b'[{"a": "x", "y": 1}, []]', "row 2 is not an object"),
    ("x.json", b"[", "Expecting value"),
    ("x.jsonl", b'{"a": ' + DEEP + b"}", "row 1: it is nested too deeply"),
    ("x.json", DEEP, "it is nested too deeply"),
    ("x.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "row 1: Exceeds the limit"),
    ("x.jsonl", b'{"a": "x", "y": ' + b"9" * 400 + b"}", "row 1: label '9{77}...' is not a class"),
    ("x.jsonl", b'{"a": "\\ud800", "y": 1}', "row 1: column 'a' holds half a character"),
    ("x.jsonl", b'{"a": NaN, "y": 1}', "row 1: column 'a' is 'nan', not a text"),
    ("x.jsonl", b'{"a": ["x"], "y": 1}', "row 1: column 'a' holds a list, not a text"),
    ("x.jsonl", b'{"a": {"b": 1}, "y": 1}', "row 1: column 'a' holds an object, not a text"),
    ("x.csv", b'"a\nb\x1b[0m",y\nx,1\n', r"row 1: no column 'a'; it has a\\nb\\x1b\[0m, y$"),
    ("x.csv.gz", gzip.compress(b"a,y\nx,1\n")[:-6], "ended before the end"),
    ("x.csv.bz2", bz2.compress(b"a,y\nx,1\n")[:-6], "ended before the end"),
    ("x.csv.xz", lzma.compress(b"a,y\nx,1\n")[:-6], "ended before the end"),
    ("x.csv.zst", pyarrow.compress(b"a,y\nx,1\n", "zstd", asbytes=True)[:-3], "Truncated"),
    ("x.csv.gz", b"a,y\nx,1\n", "Not a gzipped file"),
    ("x.csv", gzip.compress(b"a,y\nx,1\n"), "line 1 is not UTF-8"),
    ("x.parquet", b"a,y\nx,1\n", "cannot be read as parquet"),
    ("x.parquet", parquet([{"a": b"x", "y": 1}]), "row 1: column 'a' holds bytes, not a text"),
    ("x.parquet", parquet([{"a": None, "y": 1}]), "row 1: column 'a' has no value"),
    ("x.gz", b"", "unknown kind of file; use .csv, .tsv, .json, .jsonl, .parquet, alone"),
    ("csv", b"", "unknown kind of file"),
]


@QUICK
@given(st.data())
def test_how_much_is_read_at_a_time_changes_nothing(tmp_path, data):
    """Rows of odd texts, then some damage: the same rows or the same line, piece by piece."""
    texts = data.draw(st.lists(TEXTS, min_size=1, max_size=6))
    rows = [{"a": t, "y": t[::-1]} for t in texts]
    kind = data.draw(st.sampled_from(["csv", "tsv", "jsonl"]))
    written = bytearray(WRITERS[kind](rows))
    for _ in range(data.draw(st.integers(0, 2))):
        i = data.draw(st.integers(0, len(written)))
        written[i : i + 1] = data.draw(st.sampled_from([b'"', b"\n", b"\r", b",", b"\t", b""]))
    path = tmp_path / f"x.{kind}{data.draw(st.sampled_from(list(PACKERS)))}"
    path.write_bytes(PACKERS.get(path.suffix, bytes)(bytes(written)))

    def found(size):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("beft_ext.tasks.rows.PIECE", size)
            try:
                return read_rows(path)
            except DataError as error:
                return str(error)

    whole = found(2**20)
    for size in (1, data.draw(st.integers(2, 30))):
        pieces = found(size)
        # Of two faults the first in the file may be told, or the first that is looked for.
        assert pieces == whole or (isinstance(pieces, str) and isinstance(whole, str))


def test_a_file_is_not_held_in_memory(tmp_path, monkeypatch):
    """Eight times the rows: the same peak of what Python holds."""
    import tracemalloc

    monkeypatch.setattr("beft_ext.tasks.rows.PIECE", 2**13)
    peaks = {}
    for kind, writer in WRITERS.items():
        if kind == "json":
            continue
        for count in (2_000, 16_000):
            path = tmp_path / f"x.{kind}"
            path.write_bytes(writer([{"a": "some words of a text", "y": 1}] * count))
            tracemalloc.start()
            assert sum(1 for _ in iterate_rows(path)) == count
            peaks[kind, count] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peaks[kind, 16_000] < 1.5 * peaks[kind, 2_000], peaks


@pytest.mark.parametrize(("name", "data", "message"), BROKEN)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, name, data)
    said = str(caught.value)
    assert said.startswith(str(tmp_path / name)) and said.isprintable() and len(said) < 400


def test_columns_of_one_name_in_parquet_are_refused(tmp_path):
    table = pyarrow.table([["x"], ["z"], [1]], names=["a", "a", "y"])
    parquet_files.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="column 'a' is there twice"):
        read_rows(tmp_path / "x.parquet")


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(DataError, match=r"x.csv: a folder, not a file"):
        read_rows(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"z.csv: no such file"):
        read_rows(tmp_path / "z.csv")


def test_no_damage_is_a_traceback(tmp_path):
    """Bytes changed, added and taken away at random: rows, or one line."""
    chance = random.Random(0)
    rows = [{"a": 'x, "y"\n', "y": 1}, {"a": "z\t", "y": 0}]
    refused = 0
    for kind, writer in WRITERS.items():
        for pack in ("", ".gz", ".zst"):
            for _ in range(40):
                data = bytearray(PACKERS[pack](writer(rows)))
                for _ in range(chance.randrange(1, 4)):
                    i, new = chance.randrange(len(data)), chance.choice(b'",\t\n\r{}[]\0\xff1a')
                    data[i : i + chance.randrange(3)] = bytes([new] * chance.randrange(3))
                try:
                    read(tmp_path, f"x.{kind}{pack}", bytes(data))
                except DataError as error:
                    refused += 1
                    assert str(error).isprintable() and "x." in str(error)
    assert refused > 200


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("pack", PACKERS)
def test_a_named_task_is_read_from_every_kind(tmp_path, kind, pack):
    (tmp_path / "rte").mkdir()
    rows = [{"sentence1": "p", "sentence2": "h", "label": 1}]
    (tmp_path / "rte" / f"train.{kind}{pack}").write_bytes(PACKERS[pack](WRITERS[kind](rows)))
    (found,) = load_task("rte", "train", tmp_path)
    assert (found.text, found.pair, found.label) == ("p", "h", 1)


def test_two_files_of_one_split_are_refused(tmp_path):
    (tmp_path / "rte").mkdir()
    for name in ("train.jsonl", "train.csv.gz", "train.txt"):
        (tmp_path / "rte" / name).write_text("")
    with pytest.raises(DataError, match=r"train.csv.gz: train.jsonl is beside it"):
        load_task("rte", "train", tmp_path)


class Set(list):
    """What ``load_dataset`` returns, as far as it is used."""

    def __init__(self, rows, **names):
        super().__init__(rows)
        self.features = {c: types.SimpleNamespace(names=n) for c, n in names.items()}
        self.features["sentence"] = types.SimpleNamespace(dtype="string")


@pytest.fixture
def hub(monkeypatch):
    """``datasets`` with a hub of one set; what it was asked."""
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        if isinstance(hub.holds, Exception):
            raise hub.holds
        return hub.holds

    hub = types.SimpleNamespace(load_dataset=load_dataset, asked=asked, holds=None)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return hub


def test_the_hub_runs_no_code_and_names_classes(hub):
    rows = [{"sentence": "s ", "label": i} for i in (0, 1, 0)]
    hub.holds = Set(rows, label=["positive", "negative"])  # the task's are in the other order
    assert [e.label for e in load_task("sst2", "train")] == [1, 0, 1]
    assert hub.asked == [(("nyu-mll/glue", "sst2"), {"split": "train", "trust_remote_code": False})]
    assert load_task("sst2", "validation")[0].text == "s"
    premise = {"premise": "p.", "choice1": "A b.", "choice2": "I b.", "question": "cause"}
    hub.holds = Set([premise | {"label": 1}], label=["choice1", "choice2"])
    (found,) = load_task("copa", "train")
    assert found.right == (1,) and found.options == ("a b.", "I b.") and found.text == "p because"


def test_the_hubs_name_of_a_split(hub):
    hub.holds = Set([{"premise": "p", "hypothesis": "h", "label": 1}])
    for asked, there in (("validation", "validation_matched"), ("train", "train")):
        load_task("mnli", asked)
        assert hub.asked[-1][1]["split"] == there


@pytest.mark.parametrize("hidden", [-1, None, 2])
def test_a_class_that_the_hub_hides_is_no_class(hub, hidden):
    hub.holds = Set([{"sentence": "s", "label": hidden}], label=["negative", "positive"])
    with pytest.raises(DataError, match=r"^the hub's sst2, row 1: column 'label' has no value"):
        load_task("sst2", "test")


def test_what_the_hub_says_is_one_line(hub):
    for error, said in ((OSError(""), "OSError"), (ValueError("gone\nfor good"), "gone")):
        hub.holds = error
        with pytest.raises(DataError, match=rf"^the hub's 'a, b' could not be read \({said}\): "):
            hub_rows("a", "b", "train", "here")


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] in ("pyarrow", "datasets")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"needs datasets: pip install 'beft-ext\[data\]'"):
        hub_rows("a", None, "train", "here")
    rows = [{"a": "t", "y": 1}]
    for kind in ("csv", "tsv", "parquet"):
        with pytest.raises(DataError, match=rf"x.{kind}: .{kind} needs pyarrow: pip install pyar"):
            read(tmp_path, f"x.{kind}", separated(rows))
    for name in ("x.json", "x.jsonl.gz"):
        data = json.dumps(rows[0]).encode()
        assert read(tmp_path, name, gzip.compress(data) if "gz" in name else data)[0].label == 1


def test_a_data_set_of_datasets_itself(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features(
        q=datasets.Value("string"),
        answers={"text": datasets.List(datasets.Value("string"))},
        label=datasets.ClassLabel(names=["no", "yes"]),
    )
    rows = [{"q": "a", "answers": {"text": ["x"]}, "label": 1}, {"q": "b", "answers": None}]
    made = datasets.Dataset.from_list([{"label": None, **r} for r in rows], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: made)
    found = [row for _, row in hub_rows("x", None, "train", "here").numbered()]
    assert [r["label"] for r in found] == ["yes", None]
    answer = Task(text="{q}", kind="generation", answers="answers.text")
    assert answer.examples(found[:1], "")[0].answers == ("x",)
    with pytest.raises(DataError, match=r"row 1: column 'answers.text' has no value"):
        answer.examples(found[1:], "here")
