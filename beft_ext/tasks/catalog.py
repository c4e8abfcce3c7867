"""The named tasks: GLUE, SuperGLUE, SQuAD and DROP, with the fields of the hub's data sets.

Prompts and verbalisers are those of the paper's decoder experiments where it has any.
"""

from __future__ import annotations

from pathlib import Path

from beft_ext.tasks.cells import DataError, Row, shown, text, texts
from beft_ext.tasks.examples import Example
from beft_ext.tasks.rows import Rows, find_file, hub_rows
from beft_ext.tasks.task import Task

YES_NO, NO_YES = ("Yes", "No"), ("No", "Yes")


def load_task(name: str, split: str, folder: Path | None = None) -> list[Example]:
    """One split of a named task.

    Args:
        folder: holds a folder of the task's name, and in it a file of the split's name, such as
            ``train.jsonl``. Without it the rows come from the hub.

    Raises:
        DataError: for an unknown task, a missing file or package, or a hub out of reach.
    """
    rows = task_rows(name, split, folder)
    return list(named_task(name).made(rows.numbered(), rows.where))


def task_rows(name: str, split: str, folder: Path | None = None) -> Rows:
    """The rows of one split of a named task; see ``load_task``."""
    task = named_task(name)
    if folder is not None:
        return Rows.of(find_file(folder / name, split))
    assert task.hub is not None
    return hub_rows(*task.hub, task.splits.get(split, split), f"the hub's {name}")


def named_task(name: str) -> Task:
    """Raises DataError for an unknown name."""
    if name not in TASKS:
        raise DataError(f"unknown task '{name}': choose one of {', '.join(TASKS)}")
    return TASKS[name]


def _copa(row: Row) -> Row:
    premise = text(row, "premise").rstrip().removesuffix(".")
    asked = text(row, "question")
    joined = {"cause": "because", "effect": "so"}.get(asked)
    if joined is None:
        raise DataError(f"question '{shown(asked)}' is neither 'cause' nor 'effect'")
    choices = [_continued(text(row, c)) for c in ("choice1", "choice2")]
    return row | {"opening": f"{premise} {joined}", "choices": choices}


def _continued(sentence: str) -> str:
    """A sentence in the middle of another: its first letter small, unless it is 'I'."""
    first, _, rest = sentence.partition(" ")
    return sentence if first == "I" else f"{first.lower()} {rest}"


def _record(row: Row) -> Row:
    """Each entity in the query's gap is an option; the right ones are those of the answers."""
    entities = list(dict.fromkeys(texts(row, "entities")))
    answers = texts(row, "answers", alone=True)
    if unknown := [a for a in answers if a not in entities]:
        raise DataError(f"answer '{shown(unknown[0])}' is not among the entities")
    passage = text(row, "passage").replace("@highlight\n", "- ")
    options = [text(row, "query").replace("@placeholder", e) for e in entities]
    right = sorted({entities.index(a) for a in answers})
    return row | {"story": passage, "choices": options, "right": right}


def _boolq(row: Row) -> Row:
    question = text(row, "question").rstrip("?") + "?"
    return row | {"asked": question[:1].upper() + question[1:]}


def _wsc(row: Row) -> Row:
    return row | {"pronoun": text(row, "span2_text").lower()}


def _stripped(row: Row) -> Row:
    """GLUE's sentences end with a space here and there: a prompt must not."""
    return {k: v.rstrip() if isinstance(v, str) else v for k, v in row.items()}


def _glue(name: str) -> tuple[str, str | None]:
    return "nyu-mll/glue", name


def _super_glue(name: str) -> tuple[str, str | None]:
    return "aps/super_glue", name


TASKS = {
    "cola": Task(
        text="{sentence}",
        classes=("unacceptable", "acceptable"),
        prompt="{sentence}\nIs this sentence grammatically acceptable? Yes or No?\n",
        options=NO_YES,
        metrics=("matthews", "accuracy"),
        hub=_glue("cola"),
        reshape=_stripped,
    ),
    "sst2": Task(
        text="{sentence}",
        classes=("negative", "positive"),
        prompt="{sentence} It was",
        options=(" terrible", " great"),
        hub=_glue("sst2"),
        reshape=_stripped,
    ),
    "mrpc": Task(
        text="{sentence1}",
        pair="{sentence2}",
        classes=("not_equivalent", "equivalent"),
        prompt="{sentence1}\n{sentence2}\nDo these two sentences mean the same? Yes or No?\n",
        options=NO_YES,
        metrics=("accuracy", "f1"),
        hub=_glue("mrpc"),
    ),
    "stsb": Task(
        text="{sentence1}",
        pair="{sentence2}",
        kind="regression",
        metrics=("spearman", "pearson"),
        hub=_glue("stsb"),
    ),
    "qqp": Task(
        text="{question1}",
        pair="{question2}",
        classes=("not_duplicate", "duplicate"),
        prompt="{question1}\n{question2}\nDo these two questions ask the same? Yes or No?\n",
        options=NO_YES,
        metrics=("accuracy", "f1"),
        hub=_glue("qqp"),
    ),
    "mnli": Task(
        text="{premise}",
        pair="{hypothesis}",
        classes=("entailment", "neutral", "contradiction"),
        prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, Maybe, or No?\n',
        options=("Yes", "Maybe", "No"),
        hub=_glue("mnli"),
        splits={"validation": "validation_matched"},
    ),
    "qnli": Task(
        text="{question}",
        pair="{sentence}",
        classes=("entailment", "not_entailment"),
        prompt='{sentence}\nDoes this sentence answer the question "{question}"? Yes or No?\n',
        options=YES_NO,
        hub=_glue("qnli"),
    ),
    "rte": Task(
        text="{sentence1}",
        pair="{sentence2}",
        classes=("entailment", "not_entailment"),
        prompt='{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n',
        options=YES_NO,
        hub=_glue("rte"),
    ),
    "cb": Task(
        text="{premise}",
        pair="{hypothesis}",
        classes=("entailment", "contradiction", "neutral"),
        prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        options=("Yes", "No", "Maybe"),
        metrics=("accuracy", "f1_macro"),
        hub=_super_glue("cb"),
    ),
    "wic": Task(
        text="{sentence1}",
        pair="{sentence2}",
        classes=("False", "True"),
        prompt='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n",
        options=NO_YES,
        hub=_super_glue("wic"),
    ),
    "boolq": Task(
        text="{question}",
        pair="{passage}",
        label="label",
        classes=("False", "True"),
        prompt="{passage} {asked}\n",
        options=NO_YES,
        hub=_super_glue("boolq"),
        reshape=_boolq,
    ),
    "wsc": Task(
        text="{text}",
        pair="{span2_text}: {span1_text}",
        classes=("False", "True"),
        prompt="{text}\nIn the previous sentence, does the pronoun "
        '"{pronoun}" refer to {span1_text}? Yes or No?\n',
        options=NO_YES,
        hub=_super_glue("wsc.fixed"),
        reshape=_wsc,
    ),
    "copa": Task(
        text="{opening}",
        kind="choice",
        classes=("choice1", "choice2"),
        prompt="{opening} ",
        options="choices",
        learn="answer",
        hub=_super_glue("copa"),
        reshape=_copa,
    ),
    "multirc": Task(
        text="{paragraph}",
        pair="{question} {answer}",
        classes=("False", "True"),
        prompt='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". '
        "Is that correct? Yes or No?\n",
        options=NO_YES,
        metrics=("accuracy", "f1"),
        hub=_super_glue("multirc"),
    ),
    "record": Task(
        text="{passage}",
        kind="choice",
        label="right",
        prompt="{story}\n- ",
        options="choices",
        learn="answer",
        hub=_super_glue("record"),
        reshape=_record,
    ),
    "squad": Task(
        text="{question}",
        pair="{context}",
        kind="generation",
        prompt="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        answers="answers.text",
        metrics=("token_f1", "exact_match"),
        hub=("rajpurkar/squad", None),
    ),
    "drop": Task(
        text="{question}",
        pair="{passage}",
        kind="generation",
        prompt="Passage: {passage}\nQuestion: {question}\nAnswer:",
        answers="answers_spans.spans",
        metrics=("token_f1", "exact_match"),
        hub=("ucinlp/drop", None),
    ),
}
