"""What each named task makes of a row: texts, prompt, options, label; and the paper's words."""

import pytest

from beft_ext.tasks import TASKS, DataError, named_task

PAIR = {"sentence1": "The cat sat. ", "sentence2": "A cat was sitting."}
NLI = {"premise": "It rains.", "hypothesis": "It is wet."}
COPA = {"premise": "The man fell. ", "choice1": "The road was icy.", "choice2": "I slept."}
RECORD = {
    "passage": "Ann met Bo.\n@highlight\nBo left\n@highlight\nAnn stayed",
    "query": "@placeholder went away.",
    "entities": ["Ann", "Bo", "Ann", "Cy"],
}
# Row; texts; prompt; options; label or the right ones.
MADE = {
    "cola": (
        {"sentence": "They drank. ", "label": "acceptable"},
        ("They drank.", None),
        "They drank.\nIs this sentence grammatically acceptable? Yes or No?\n",
        ("No", "Yes"),
        (1,),
    ),
    "sst2": (
        {"sentence": "a gorgeous film ", "label": "positive"},
        ("a gorgeous film", None),
        "a gorgeous film It was",
        (" terrible", " great"),
        (1,),
    ),
    "mrpc": (
        PAIR | {"label": "equivalent"},
        tuple(PAIR.values()),
        "The cat sat. \nA cat was sitting.\nDo these two sentences mean the same? Yes or No?\n",
        ("No", "Yes"),
        (1,),
    ),
    "qqp": (
        {"question1": "Why?", "question2": "How so?", "label": "duplicate"},
        ("Why?", "How so?"),
        "Why?\nHow so?\nDo these two questions ask the same? Yes or No?\n",
        ("No", "Yes"),
        (1,),
    ),
    "mnli": (
        NLI | {"label": "neutral"},
        ("It rains.", "It is wet."),
        'Suppose It rains. Can we infer that "It is wet."? Yes, Maybe, or No?\n',
        ("Yes", "Maybe", "No"),
        (1,),
    ),
    "qnli": (
        {"question": "Who?", "sentence": "He did.", "label": "not_entailment"},
        ("Who?", "He did."),
        'He did.\nDoes this sentence answer the question "Who?"? Yes or No?\n',
        ("Yes", "No"),
        (1,),
    ),
    "rte": (
        PAIR | {"label": "entailment"},
        tuple(PAIR.values()),
        'The cat sat. \nDoes this mean that "A cat was sitting." is true? Yes or No?\n',
        ("Yes", "No"),
        (0,),
    ),
    "cb": (
        NLI | {"label": "neutral"},
        ("It rains.", "It is wet."),
        'Suppose It rains. Can we infer that "It is wet."? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        (2,),
    ),
    "wic": (
        PAIR | {"word": "cat", "label": True},
        tuple(PAIR.values()),
        'Does the word "cat" have the same meaning in these two sentences? Yes, No?\n'
        "The cat sat. \nA cat was sitting.\n",
        ("No", "Yes"),
        (1,),
    ),
    "boolq": (
        {"question": "is it so??", "passage": "It is.", "label": False},
        ("is it so??", "It is."),
        "It is. Is it so?\n",
        ("No", "Yes"),
        (0,),
    ),
    "wsc": (
        {"text": "Ann saw. She left.", "span1_text": "Ann", "span2_text": "She", "label": "True"},
        ("Ann saw. She left.", "She: Ann"),
        "Ann saw. She left.\nIn the previous sentence, does the pronoun "
        '"she" refer to Ann? Yes or No?\n',
        ("No", "Yes"),
        (1,),
    ),
    "copa": (
        COPA | {"question": "cause", "label": 0},
        ("The man fell because", None),
        "The man fell because ",
        ("the road was icy.", "I slept."),
        (0,),
    ),
    "multirc": (
        {"paragraph": "He ran.", "question": "Who ran?", "answer": "he", "label": 1},
        ("He ran.", "Who ran? he"),
        'He ran.\nQuestion: Who ran?\nI found this answer "he". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        (1,),
    ),
    "record": (
        RECORD | {"answers": ["Cy", "Ann"]},
        (RECORD["passage"], None),
        "Ann met Bo.\n- Bo left\n- Ann stayed\n- ",
        ("Ann went away.", "Bo went away.", "Cy went away."),
        (0, 2),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_a_row_becomes(name):
    row, texts, prompt, options, right = MADE[name]
    (found,) = named_task(name).examples([row], "")
    assert (found.text, found.pair) == texts
    assert (found.prompt, found.options, found.right) == (prompt, options, right)


def test_copa_goes_from_cause_to_effect():
    (found,) = named_task("copa").examples([COPA | {"question": "effect", "label": "choice2"}], "")
    assert found.text == "The man fell so" and found.right == (1,)


def test_tasks_that_generate_and_count():
    row = {"title": "T", "context": "Bo left.", "question": "Who?", "answers": {"text": ["Bo"]}}
    (found,) = named_task("squad").examples([row], "")
    assert (found.text, found.pair, found.answers) == ("Who?", "Bo left.", ("Bo",))
    assert found.prompt == "Title: T\nContext: Bo left.\nQuestion: Who?\nAnswer:"
    row = {"passage": "Two men.", "question": "How many?"}
    row["answers_spans"] = {"spans": ["2", "two"], "types": ["number", "span"]}
    (found,) = named_task("drop").examples([row], "")
    assert (found.text, found.pair, found.answers) == ("How many?", "Two men.", ("2", "two"))
    assert found.prompt == "Passage: Two men.\nQuestion: How many?\nAnswer:"
    (found,) = named_task("stsb").examples([PAIR | {"label": "3.8"}], "")
    assert (found.text, found.pair, found.label) == (*PAIR.values(), 3.8)


def test_the_metric_that_decides_is_the_papers():
    first = {name: task.metric for name, task in TASKS.items() if task.metric != "accuracy"}
    paper = {"cola": "matthews", "stsb": "spearman", "squad": "token_f1", "drop": "token_f1"}
    assert first == paper
    assert TASKS["cb"].metrics == ("accuracy", "f1_macro")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("copa", COPA | {"question": "why", "label": 0}, "question 'why' is neither 'cause' nor"),
        ("copa", COPA | {"question": None, "label": 0}, "column 'question' has no value"),
        ("copa", {"premise": "a", "question": "cause"}, "no column 'choice1'; it has premise, q"),
        ("record", RECORD | {"answers": ["Di"]}, "answer 'Di' is not among the entities"),
        ("record", RECORD | {"answers": []}, "column 'answers' is an empty list"),
        ("record", RECORD | {"entities": "Ann"}, "column 'entities' holds 'Ann', not a list"),
        ("boolq", {"question": 1j, "passage": ""}, "column 'question' holds a complex, not a text"),
        ("wsc", {"span2_text": ["She"]}, "column 'span2_text' holds a list, not a text"),
        ("sst2", {"sentence": None, "label": 0}, "column 'sentence' has no value"),
        ("sst2", {"sentence": "s", "label": -1}, "label '-1' is not a class number"),
    ],
)
def test_a_row_of_another_shape_is_named(name, row, message):
    with pytest.raises(DataError, match=rf"^here, row 1: {message}"):
        named_task(name).examples([row], "here")
