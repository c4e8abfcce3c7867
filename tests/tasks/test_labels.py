"""What labels mean: classes, right options, targets; and which of them are refused."""

import itertools
import json

import pytest
from hypothesis import given, settings, strategies as st

from beft_ext.commands.sources import Source
from beft_ext.tasks import DataError, Task
from beft_ext.tasks.metrics import measure

STARS = Task(text="{a}", label="y", classes=("1", "2", "3", "4", "5"))
MOOD = Task(text="{a}", label="y", classes=("negative", "positive"))
PLAIN = Task(text="{a}", label="y")
CHOICE = Task(text="{a}", kind="choice", options="c", label="y")


def labels(task, *values):
    return [e.label for e in task.examples([{"a": "t", "y": v} for v in values], "here")]


def refused(task, value, message, **row):
    with pytest.raises(DataError, match=rf"^here, row 2: {message}"):
        good = {"a": "t", "c": ["u", "v"], "y": task.classes[0] if task.classes else 1}
        task.examples([good, good | {"y": value} | row], "here")


SAME = (
    (1, 1.0, "1", "1.0", "01", " 1", "+1", "1E0", True, "True", "true", "TRUE", [1], "[1]", (1,)),
    (0, 0.0, -0.0, "0", "-0", "0.00", False, "False", "false", [0], ["0"], "[false]"),
)


@pytest.mark.parametrize("classes", [(), ("no", "yes"), ("0", "1"), ("False", "True")])
def test_texts_numbers_and_booleans_are_one_label(classes):
    task = Task(text="{a}", label="y", classes=classes)
    for label, same in ((1, SAME[0]), (0, SAME[1])):
        assert labels(task, *same) == [label] * len(same)


def test_numbers_that_are_names_are_no_class_numbers():
    assert labels(STARS, 1, "2", 4.0, "5.0") == [0, 1, 3, 4]
    refused(STARS, 0, "label '0' is none of the classes 1, 2, 3, 4, 5$")
    refused(STARS, "many", "label 'many' is none of the classes")
    assert labels(Task(text="{a}", label="y", classes=(2, 7)), "7", 2.0, 7) == [1, 0, 1]
    backwards = Task(text="{a}", label="y", classes=("True", "False"))
    assert labels(backwards, True, 1, "false", 0) == [0, 0, 1, 1]
    signs = Task(text="{a}", label="y", classes=("-1", "0.5", "many"))
    assert labels(signs, -1, 0.5, "many", "-1.0", ".50") == [0, 1, 2, 0, 1]
    refused(signs, 2, "label '2' is none of the classes")


def test_names_are_classes_and_so_are_their_numbers():
    assert labels(MOOD, "positive", "negative", 1, "0") == [1, 0, 1, 0]
    for value in ("Positive", " positive", "positive ", ""):
        refused(MOOD, value, rf"label '{value}' is not a class number 0, 1, 2, ... nor one of neg")
    refused(MOOD, 2, "label '2' is outside the 2 options")


@given(st.permutations(["a", "b", "c", 1, 2.0, "1"]), st.permutations(["a", "b", "c", "1"]))
@settings(deadline=None, max_examples=30)
def test_the_order_of_rows_numbers_no_class(values, classes):
    """The number of a class is its place in ``classes``, or itself."""
    task = Task(text="{a}", label="y", classes=(*classes, "2"))
    place = {name: i for i, name in enumerate(classes)} | {1: classes.index("1"), 2.0: 4}
    assert labels(task, *values) == [place[v] for v in values]


def test_numbers_with_gaps_are_classes_as_they_are():
    assert labels(PLAIN, 4, 0, "2") == [4, 0, 2]


@pytest.mark.parametrize(
    "value",
    [-1, "-1", 0.5, "0.5", "good", "", "1_0", "\u0661", "0x1", "1,0", 2**53, 1e300, "1e9999"],
)
def test_what_counts_no_class_is_refused(value):
    told = "label '.*' is not a class number 0, 1, 2, ...: (name the task's|.* --kind regression$)"
    refused(PLAIN, value, told)


def learnt(*values):
    return PLAIN.with_classes_of([{"a": "t", "y": v} for v in values], "train")


@given(st.permutations(["refund", "praise", "delivery", "refund", "ärger", "Zoll"]))
@settings(deadline=None, max_examples=20)
def test_classes_are_the_sorted_words_of_the_training_rows(words):
    task = learnt(*words)
    assert task.classes == ("Zoll", "delivery", "praise", "refund", "ärger")
    assert labels(task, "praise", "ärger") == [2, 4]


def test_classes_that_are_numbers_go_by_size():
    assert learnt("10", 9, "2.0", 10.0, "-1").classes == ("-1", "2", "9", "10")
    assert labels(learnt(4, 0, "2"), 4, "0.0", 2) == [2, 0, 1]
    assert learnt("b", 3, "a", "03").classes == ("3", "a", "b")


def test_true_and_false_are_called_so_unless_they_are_numbers():
    for same in itertools.product(*SAME):
        task = learnt(*same)
        assert task.classes in (("0", "1"), ("False", "True"), ("0", "True"), ("False", "1"))
        assert labels(task, *SAME[1], *SAME[0]) == [0] * len(SAME[1]) + [1] * len(SAME[0])
    assert learnt(True, "false", False, "TRUE").classes == ("False", "True")
    assert learnt(True, "false", 0, "TRUE").classes == ("0", "True")


def test_a_class_that_no_training_row_has_is_named():
    task = learnt("refund", "praise")
    told = "label '{}' is none of the classes of the training rows, praise, refund"
    refused(task, "delivery", told.format("delivery") + "$")
    refused(task, "", told.format("") + "$")
    refused(task, 1, told.format(1) + "; for numbers that are to be predicted, give --kind regr")
    refused(learnt(3, 1), "2", "label '2' is none of the classes of the training rows, 1, 3; for")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, "1e9999"), "row 2: label '1e9999' is a number and no class"),
        ((1, 0.5), "row 2: label '0.5' is a number and no class: .*, give --kind regression"),
        (("a", " "), "row 2: column 'y' is blank"),
        (("a", None), "row 2: column 'y' has no value"),
        (("a", ["b", "c"]), "row 2: column 'y' lists 2 classes, not one"),
        (("a", b"b"), "row 2: column 'y' holds bytes"),
        (("a", "a"), "every row has the label 'a', and a classification needs two classes"),
        ((1, "1.0", True), "every row has the label '1'"),
        (("Refund", "a", "refund"), "the classes 'Refund' and 'refund' differ by capitals"),
        (("a b", "a  b", "c"), "the classes 'a b' and 'a  b' differ by capitals or spaces"),
        (range(10_001), "more than 10000 classes; .*, give --kind regression"),
    ],
)
def test_labels_that_make_no_classes_are_refused(values, message):
    with pytest.raises(DataError, match=f"^train(,|:) {message}"):
        learnt(*values)


def test_only_a_task_that_names_no_class_learns_them():
    for task in (MOOD, CHOICE, Task(text="{a}", label="y", options=("x", "y"))):
        assert task.with_classes_of([{"a": "t", "y": "other"}], "") is task


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "column 'y' is 'nan', not a class number or name"),
        (float("inf"), "column 'y' is 'inf', not a class number or name"),
        (None, "column 'y' has no value"),
        (b"1", "column 'y' holds bytes, not a class number or name"),
        ({"n": 1}, "column 'y' holds an object, not a class number or name"),
        ([[1]], "column 'y' holds a list, not a class number or name"),
        ([None], "column 'y' has an entry without a value"),
        ([], "column 'y' lists no class"),
        (1j, "column 'y' holds a complex, not a class number or name"),
    ],
)
def test_what_is_no_label_is_refused(value, message):
    refused(PLAIN, value, message)
    refused(CHOICE, value, message)


def test_a_classification_has_one_right_class():
    for value in ([0, 1], [1, 0], "[1, 0]", [1, 1], ["1", True]):
        refused(PLAIN, value, "column 'y' lists 2 classes, and a classification has one right")


def test_a_choice_may_have_several_right_options():
    for value in ([1, 0], (1, 0), "[1, 0]", ["1", False]):
        (found,) = CHOICE.examples([{"a": "t", "c": ["u", "v"], "y": value}], "")
        assert found.right == (1, 0) and found.label == 1
        assert [measure(["accuracy"], [p], [found])["accuracy"] for p in (0, 1)] == [1, 1]
    refused(CHOICE, [1, 1], "column 'y' lists option 1 twice")
    refused(CHOICE, [0, 2], r"label '2' is outside the 2 options \(0..1\)")
    for metric in ("f1", "f1_macro", "matthews"):
        task = Task(text="", kind="choice", options="c", label="y", metrics=("accuracy", metric))
        refused(task, [0, 1], f"column 'y' lists 2 right options, and '{metric}' counts one alone")


def test_targets_are_numbers_and_no_classes():
    task = Task(text="{a}", label="y", kind="regression")
    assert labels(task, 3.5, "-1e-3", 7, " 2.50", ".5") == [3.5, -1e-3, 7, 2.5, 0.5]
    assert all(e.right == () for e in task.examples([{"a": "t", "y": 20_000}], ""))
    for value in ("nan", "NaN", float("nan"), "inf", float("-inf"), 1e39, "1e999", 10**400):
        refused(task, value, "column 'y' is '.*', not a finite number")
    for value in (True, "True", "", "1,5", "1_0", "good", "[1]", "\u0663"):
        refused(task, value, "column 'y' is '.*', not a finite number")
    refused(task, [1.0], "column 'y' holds a list, not a finite number")
    refused(task, None, "column 'y' has no value")


def test_numpys_values_are_pythons():
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    assert labels(PLAIN, np.int64(1), np.bool_(True), np.float32(2)) == [1, 1, 2]
    row = {"a": np.float32(0.5), "c": np.array(["u", "v"]), "y": np.array([0, 1])}
    (found,) = CHOICE.examples([row], "")
    assert (found.text, found.options, found.right) == ("0.5", ("u", "v"), (0, 1))


def test_options_and_answers_are_lists_of_texts():
    refused(CHOICE, 1, r"column 'c' holds 'uv', not a list", c="uv")
    refused(CHOICE, 1, r"column 'c' holds '\['u', 'v'\]', not a list: write lists", c="['u', 'v']")
    refused(CHOICE, 1, "column 'c' is an empty list", c=[])
    refused(CHOICE, 1, "column 'c' has an entry without a value", c=["u", None])
    refused(CHOICE, 1, "column 'c' is 'nan', not a text", c=["u", float("nan")])
    task = Task(text="{a}", kind="generation", answers="c")
    refused(task, 1, r"column 'c' holds '\['u'\]', not a list", c="['u']")
    refused(task, 1, "column 'c' is an empty list", c="[]")
    for said, answers in (("[sic]", ("[sic]",)), ("u", ("u",)), (2, ("2",)), ('["u"]', ("u",))):
        (found,) = task.examples([{"a": "t", "c": said}], "")
        assert found.answers == answers


def test_a_task_that_contradicts_itself_is_refused():
    for classes in (("1", "1.0"), ("True", "1"), ("a", "b", "a")):
        with pytest.raises(DataError, match=f"^classes {', '.join(classes)}: two of them are"):
            Task(text="", classes=classes)
    with pytest.raises(DataError, match="3 classes and 2 options: give one option for each"):
        Task(text="", classes=("a", "b", "c"), options=("x", "y"))
    with pytest.raises(DataError, match="'f1' is for two classes: use f1_macro"):
        Task(text="", classes=("a", "b", "c"), metrics=("accuracy", "f1"))


def test_f1_is_of_two_classes():
    task = Task(text="{a}", label="y", metrics=("accuracy", "f1"))
    refused(task, 2, "label '2': 'f1' is for classes 0 and 1, use f1_macro")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    examples = task.examples([{"a": "t", "y": y} for y in (0, 1, 1)], "")
    with pytest.raises(DataError, match=r"^f1_score cannot be counted: Target is multiclass"):
        measure(task.metrics, [0, 1, 2], examples)


def test_a_model_that_predicts_nan_is_named():
    pytest.importorskip("scipy", reason="scipy is not installed")
    task = Task(text="{a}", label="y", kind="regression", metrics=("pearson", "spearman"))
    examples = task.examples([{"a": "t", "y": y} for y in (0, 1, 2)], "")
    for metric, wrong in itertools.product(task.metrics, ("nan", "inf")):
        with pytest.raises(DataError, match=f"the model predicts {wrong}: its training has div"):
            measure([metric], [0.0, float(wrong), 1.0], examples)


TEMPLATES = {
    "{a} and {b}": "A and B",
    "{{a}} {{{a}}} {a}}}": "{a} {A} A}",
    '{{"x": {a}}}': '{"x": A}',
    "{n.m}": "M",
    "{n.m.o}": "dots first",
    "{j.k}": "K",
    "": "",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_name_columns(template):
    row = {"a": "A", "b": "B", "n": {"m": "M"}, "n.m.o": "dots first", "label": 0}
    row["j"] = '{"k": "K"}'
    (found,) = Task(text=template).examples([row], "")
    assert found.text == TEMPLATES[template]


@pytest.mark.parametrize(
    "name",
    [
        *("a!r", "a!s", "a:>9", "a:", "a[0]", "n[m]", "a.", "0", "row", "self", "A"),
        *("a.__class__", "a.upper", "n.keys", "n.m.__class__", "a.__init__.__globals__"),
    ],
)
def test_templates_do_nothing_else(name):
    row = {"a": "A", "n": {"m": "M"}, "label": 0}
    for task in (Task(text=f"{{{name}}}"), Task(text="", prompt=f"x{{{name}}}"),
                 Task(text="", pair=f"{{{name}}}"), Task(text="", options=("", f"{{{name}}}")),
                 Task(text="", label=name)):  # fmt: skip
        with pytest.raises(DataError) as caught:
            task.examples([row], "here")
        assert str(caught.value) == f"here, row 1: no column '{name}'; it has a, n, label"


@pytest.mark.parametrize(
    "template", ["{", "}", "{a", "a}", "{}", "{a{b}}", "{a}}", "{a{{b}", "{{}"]
)
def test_a_template_with_a_brace_alone_is_refused(template):
    for fields in ({"text": template}, {"text": "", "options": ("x", template)},
                   {"text": "", "pair": template}, {"text": "", "prompt": template}):  # fmt: skip
        with pytest.raises(DataError, match=r"^template '.*': (a brace without|there is no name)"):
            Task(**fields)


@pytest.mark.parametrize("name", ["a", "a{b}", "{a}", "a}", "}{", "a.b", "0", "a!r:>3", "{{a}}"])
def test_a_column_of_any_name_is_given_by_name(tmp_path, name):
    path = tmp_path / "x.jsonl"
    rows = [{name: "A", "the label": y, name + "2": "B"} for y in (1, 0)]
    path.write_text("\n".join(map(json.dumps, rows)))
    Task(text="{a} {{a}}", pair="{a}")  # as a template the same letters say something else
    source = Source(train_file=path, text=name, pair=name + "2", label="the label")
    found, _ = source.read("train")
    assert (found.text, found.pair, found.label) == ("A", "B", 1)


def test_many_columns_are_not_all_told():
    row = {f"c{i}": "" for i in range(1000)}
    with pytest.raises(DataError, match=r"no column 'a'; it has c0, .*, c19, \.\.\.$"):
        PLAIN.examples([row], "here")
