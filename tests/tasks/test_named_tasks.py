"""Every named task from its rows to tuned, merged and evaluated, by a head and by prompts."""

import json

import pytest

from beft_ext.commands.cli import main
from beft_ext.tasks import TASKS

PAIR = {"sentence1": "The cat sat. ", "sentence2": "A cat was sitting."}
NLI = {"premise": "The cat sat.", "hypothesis": "A cat sat."}
ROWS = {
    "cola": [{"sentence": "They drank the pub dry. ", "label": y} for y in (0, 1, 1)],
    "sst2": [{"sentence": "a gorgeous film ", "label": y} for y in (1, 0, 1)],
    "mrpc": [PAIR | {"label": y} for y in (1, 0, 1)],
    "stsb": [PAIR | {"label": y} for y in (3.8, 0.5, 5.0)],
    "qqp": [{"question1": "Why?", "question2": "How so?", "label": y} for y in (0, 1, 0)],
    "mnli": [NLI | {"label": y} for y in (0, 1, 2)],
    "qnli": [{"question": "Who?", "sentence": "He did.", "label": y} for y in (0, 1, 0)],
    "rte": [PAIR | {"label": y} for y in (0, 1, 0)],
    "cb": [NLI | {"label": y} for y in (0, 1, 2)],
    "wic": [PAIR | {"word": "cat", "label": y} for y in (False, True, 1)],
    "boolq": [{"question": "is it", "passage": "It is.", "label": y} for y in (0, True, 1)],
    "wsc": [
        {"text": "Ann saw her.", "span1_text": "Ann", "span2_text": "Her", "label": y}
        for y in (0, 1, 0)
    ],
    "copa": [
        {"premise": "The man fell.", "choice1": "I slept.", "choice2": "It was icy."}
        | {"question": q, "label": y}
        for q, y in (("cause", 1), ("effect", 0), ("cause", 1))
    ],
    "multirc": [
        {"paragraph": "He ran.", "question": "Who ran?", "answer": "he", "label": y}
        for y in (1, 0, 1)
    ],
    "record": [
        {"passage": "Ann met Bo.\n@highlight\nBo left", "query": "@placeholder went away."}
        | {"entities": names, "answers": names[-1:]}
        for names in (["Ann", "Bo"], ["Ann", "Bo", "Bo", "Cy"], ["Bo", "Ann"])
    ],
    "squad": [
        {"title": "T", "context": "Bo left.", "question": "Who left?"}
        | {"answers": {"text": ["Bo"], "answer_start": [0]}}
    ]
    * 3,
    "drop": [
        {"passage": "Two men left.", "question": "How many?"}
        | {"answers_spans": {"spans": ["2", "two"], "types": ["number", "span"]}}
    ]
    * 3,
}
HEAD = [name for name, task in TASKS.items() if task.kind != "generation"]
PROMPT = [name for name, task in TASKS.items() if task.prompt]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        for split in ("train", "validation"):
            text = "\n".join(json.dumps(row) for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    return str(folder)


def test_the_rows_are_of_every_task():
    assert list(ROWS) == list(TASKS)


def story(model, task, data, out):
    """tune, evaluate, merge, evaluate: the same predictions, numbers to the rounding of merging."""
    asked = ["--task", task, "--data", data, "--model"]
    run = ["--batch-size", "2", "--epochs", "1"]
    assert main(["tune", *asked, model, *run, "--terms", "auto", "--out", str(out / "t")]) == 0
    adapter = ["--adapter", str(out / "t" / "adapter")]
    assert main(["evaluate", *asked, model, *adapter, "--out", str(out / "a")]) == 0
    assert main(["merge", "--model", model, *adapter, "--out", str(out / "merged")]) == 0
    assert main(["evaluate", *asked, str(out / "merged"), "--out", str(out / "b")]) == 0
    first, second = (json.loads((out / x / "evaluation.json").read_text()) for x in "ab")
    if TASKS[task].kind == "regression":  # nearly equal numbers: their order is that of rounding
        assert first["predictions"] == pytest.approx(second["predictions"], rel=1e-5)
    else:
        same = first["predictions"] == second["predictions"]
        assert same and first["metrics"] == second["metrics"]
    assert list(first["metrics"]) == list(TASKS[task].metrics)


@pytest.mark.parametrize("task", HEAD)
def test_an_encoder_with_a_head(tiny_folder, task, data, tmp_path):
    story(tiny_folder, task, data, tmp_path)


@pytest.mark.parametrize("task", PROMPT)
def test_a_decoder_with_prompts(tiny_decoder, task, data, tmp_path):
    story(tiny_decoder, task, data, tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "squad"], "needs a language model"),
        (["--task", "stsb", "--objective", "prompt"], "prompts need a language model"),
        (["--task", "rte", "--objective", "prompt"], "is a bert, which does not go from left"),
        (["--task", "squad", "--objective", "auto"], "is a bert, which does not go from left"),
        (["--task", "rte", "--max-length", "2"], "leaves no room for text"),
        (["--task", "sst2", "--max-length", "0"], "--max-length"),
    ],
)
def test_a_task_on_the_wrong_kind_of_model(tiny_folder, data, tmp_path, capsys, args, message):
    args = [*args, "--objective", "head"] if "--objective" not in args else args
    full = ["tune", "--model", tiny_folder, "--data", data, *args, "--out", str(tmp_path)]
    assert main(full) == 2
    assert message in capsys.readouterr().err
