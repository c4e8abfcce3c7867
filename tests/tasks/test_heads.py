"""Task heads: what batches hold, and labels that a head has no output for."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from beft_ext.tasks import DataError, HeadObjective, Task
from beft_ext.tasks.batches import GROUP
from beft_ext.tasks.heads import LONGEST_TEXT


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return hf.AutoTokenizer.from_pretrained(tiny_folder)


def examples(task, *labels):
    return task.examples([{"a": "ab" * i, "label": y} for i, y in enumerate(labels, 1)], "")


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_label_needs_an_output(tokenizer, classes):
    task = Task(text="{a}")
    objective = HeadObjective(task, tokenizer, classes)
    (batch,) = objective.held_out(examples(task, *range(classes)), 9)
    assert sorted(batch["labels"].tolist()) == list(range(classes))
    assert batch["labels"].dtype == torch.long
    for read in (objective.held_out, lambda e, n: objective.training(e, n, 0)):
        with pytest.raises(DataError, match=rf"label {classes} does not fit .* {classes} classes"):
            read(examples(task, 0, classes), 2)


def test_the_head_is_the_tasks(tokenizer):
    def asked(number=4, **task):
        objective = HeadObjective(Task(text="{a}", **task), tokenizer, number)
        return objective.auto.removeprefix("AutoModelFor"), objective.model_options

    one = {"problem_type": "single_label_classification"}
    assert asked() == ("SequenceClassification", {"num_labels": 4, **one})
    assert asked(number=1) == ("SequenceClassification", {"num_labels": 2, **one})
    assert asked(classes=("a", "b", "c"))[1] == {"num_labels": 3, **one}
    number = {"num_labels": 1, "problem_type": "regression"}
    assert asked(kind="regression") == ("SequenceClassification", number)
    assert asked(kind="choice", options="c") == ("MultipleChoice", {})


def test_targets_of_a_regression_are_numbers(tokenizer):
    task = Task(text="{a}", kind="regression")
    (batch,) = HeadObjective(task, tokenizer, 2).training(examples(task, 7.5, -2), 2, seed=0)
    assert sorted(batch["labels"].tolist()) == [-2.0, 7.5]


def test_rows_say_what_they_have_in_common(tokenizer):
    """A number of each group, the same in all batches; a row that names none is by itself."""
    task = Task(text="{a}", group="who")
    owners = ["ann", "1", "", "bob", "1.0", "ann", "", 1]
    rows = [{"a": "ab" * i, "label": i % 2, "who": w} for i, w in enumerate(owners, 1)]
    loader = HeadObjective(task, tokenizer).training(task.examples(rows, ""), 3, seed=0)
    assert loader.grouped == GROUP and not any(GROUP in batch for batch in loader)
    loader.set_epoch(0)
    order = [i for batch in loader.plan() for i in batch]
    loader.set_epoch(0)
    found = torch.cat([batch[GROUP] for batch in loader.with_groups()])[
        torch.tensor(order).argsort()
    ]
    same = [[a == b for b in found.tolist()] for a in found.tolist()]
    kinds = ["ann", "one", "?", "bob", "one", "ann", "!", "one"]
    assert same == [[a == b for b in kinds] for a in kinds]
    plain = HeadObjective(replace(task, group=""), tokenizer).training(
        replace(task, group="").examples(rows, ""), 3, seed=0
    )
    assert plain.grouped is None and plain.with_groups() is plain
    with pytest.raises(DataError, match="row 1: no column 'who'"):
        task.examples([{"a": "b", "label": 0}], "")


def test_texts_are_cut_to_the_usual_length_or_to_ones_own(tokenizer):
    task = Task(text="{a}")
    rows = task.examples([{"a": "a " * 300, "label": 0}], "")
    for asked, length in ((None, LONGEST_TEXT), (20, 20), (200, 200)):
        objective = HeadObjective(task, tokenizer, max_length=asked)
        (batch,) = objective.held_out(rows, 1)
        assert batch["input_ids"].shape == (1, length) and objective.notes
    with pytest.raises(DataError, match="--max-length 2 leaves no room"):
        HeadObjective(task, tokenizer, max_length=2)


def test_a_metric_that_does_not_suit_the_labels_is_told_before_the_training(tokenizer):
    pytest.importorskip("sklearn", reason="scikit-learn counts f1")
    task = Task(text="{a}", metrics=("f1",))
    with pytest.raises(DataError, match="'f1' is for classes 0 and 1, use f1_macro"):
        HeadObjective(task, tokenizer, 3).held_out(examples(task, 0, 1, 2), 3)


@pytest.mark.parametrize("kind", ["classification", "regression", "choice"])
def test_what_is_observed_of_examples_is_the_loss_before_its_mean(tiny_folder, tokenizer, kind):
    options = {"options": "c"} if kind == "choice" else {}
    task = Task(text="{a}", kind=kind, **options)
    rows = [{"a": "ab" * i, "label": i % 2, "c": ["a b", "b"]} for i in range(1, 6)]
    asked = HeadObjective(task, tokenizer)
    loaded = getattr(hf, asked.auto).from_pretrained(tiny_folder, **asked.model_options).eval()
    (batch,) = asked.held_out(task.examples(rows, ""), 5)
    seen = asked.observe(loaded, batch)
    # fp32 means of five losses of like size.
    torch.testing.assert_close(seen.means.mean(), asked.loss(loaded, batch), rtol=1e-5, atol=0)
    assert (seen.probabilities is None) == (seen.outputs is not None) == (kind == "regression")


def test_texts_that_are_tokenized_together_are_as_each_alone(tokenizer):
    texts = ["a", "", "some words, or more", "ab " * 200, "é ?"]
    for pairs in ([None] * 5, ["b", "cd", "", "ef " * 100, "x y"]):
        task = Task(text="{a}", pair=None if pairs[0] is None else "{b}", classes=("n", "y"))
        rows = [{"a": t, "b": p or "", "label": 0} for t, p in zip(texts, pairs, strict=True)]
        objective = HeadObjective(task, tokenizer)
        together = objective.training(task.examples(rows, ""), 2, seed=0).rows
        for row, text, pair in zip(together, texts, pairs, strict=True):
            given = [text] if pair is None else [text, pair]
            alone = tokenizer(*given, truncation=True, max_length=LONGEST_TEXT)
            assert row.fields == [objective.reading.row(dict(alone))]
        assert objective.notes == {f"texts as long as --max-length {LONGEST_TEXT} or cut there": 1}
