"""The card: its code runs as it is printed, and it says what is known of the training."""

import json
import re

import pytest
import torch
import transformers as hf
from conftest import CONFIGS, SIZES, batch, close, tiny

import beft_ext
from beft_ext import prepare, save_adapter, select
from beft_ext.adapters.card import model_card
from beft_ext.adapters.contents import Contents

IDS = torch.tensor([[5, 6, 7, 0], [8, 9, 3, 4]])


def blocks(folder):
    return re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)


def run(code, folder, monkeypatch):
    """The model that the card's code makes, run in the adapter's folder."""
    monkeypatch.chdir(folder)
    made = {}
    exec(code, made)
    return made["model"].eval()


def answers(model):
    """What the model says: logits, or the hidden states of one without a head."""
    found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    return [t for t in found.values() if isinstance(t, torch.Tensor)][:2]


def of_head(kind, name, **options):
    """A folder's base without a head, and how to load it with one."""

    def load(folder):
        config = CONFIGS[name]() if name in CONFIGS else hf.LlamaConfig(**SIZES, pad_token_id=None)
        torch.manual_seed(0)
        hf.AutoModel.from_config(config).save_pretrained(folder)
        torch.manual_seed(0)
        return getattr(hf, kind).from_pretrained(folder, **options)

    return load


NAMES = {0: "refund", 1: "it's late", 2: "praise"}
CASES = {
    "two classes": of_head("BertForSequenceClassification", "bert"),
    "one number": of_head("BertForSequenceClassification", "bert", num_labels=1),
    "named": of_head("DistilBertForSequenceClassification", "distilbert", id2label=NAMES),
    "many": of_head(
        "RobertaForSequenceClassification", "roberta", id2label={i: f"c{i}" for i in range(100)}
    ),
    "decoder": of_head("LlamaForSequenceClassification", "llama", num_labels=5, pad_token_id=0),
    "tokens": of_head("BertForTokenClassification", "bert", num_labels=7),
    "question": of_head("BertForQuestionAnswering", "bert"),
    "language model": of_head("OPTForCausalLM", "opt"),
    "no head": of_head("BertModel", "bert"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peft"])
def test_the_code_runs_as_printed(case, ours, tmp_path, monkeypatch):
    if not ours:
        pytest.importorskip("peft", reason="peft is not installed")
    model = CASES[case](tmp_path / "base")
    prepare(model, "value")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, tmp_path / "adapter")
    first, second = blocks(tmp_path / "adapter")
    again = run(first if ours else second, tmp_path / "adapter", monkeypatch)
    with torch.no_grad():
        for found, wanted in zip(answers(again), answers(model.eval()), strict=True):
            close(found, wanted)
    assert again.config.id2label == model.config.id2label or case == "many"


def test_a_base_with_a_head_of_another_size_takes_the_adapters(tmp_path, monkeypatch):
    hf.BertForSequenceClassification(CONFIGS["bert"]()).save_pretrained(tmp_path / "base")
    kind = hf.BertForSequenceClassification
    options = {"num_labels": 4, "ignore_mismatched_sizes": True}
    model = kind.from_pretrained(tmp_path / "base", **options)
    prepare(model, "query")
    save_adapter(model, tmp_path / "adapter")
    again = run(blocks(tmp_path / "adapter")[0], tmp_path / "adapter", monkeypatch)
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("make", ["CrossEncoder", "SentenceTransformer"])
def test_the_card_of_a_wrapped_model_is_of_the_model_inside(
    make, tiny_folder, tmp_path, monkeypatch
):
    sentences = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    options = {"num_labels": 3} if make == "CrossEncoder" else {}
    model = getattr(sentences, make)(tiny_folder, device="cpu", **options)
    prepare(model, "value")
    save_adapter(model, tmp_path)
    inside = model[0].auto_model.eval()
    with torch.no_grad():
        for block in blocks(tmp_path):
            close(answers(run(block, tmp_path, monkeypatch))[0], answers(inside)[0])
    assert f"Bias adapter for {type(inside).__name__}" in (tmp_path / "README.md").read_text()


def head_of(card):
    """The hub's metadata, by line."""
    return card.split("---")[1].splitlines()


def test_the_metadata_name_a_base_of_the_hub_and_no_path(tmp_path):
    model = tiny("bert")
    nothing = Contents({}, {})
    for base, named in (("user/base", True), ("gpt2", True), (str(tmp_path), False), ("", False)):
        model.config._name_or_path = base
        lines = head_of(model_card(model, nothing, "", None))
        assert (f'base_model: "{base}"' in lines) == ("base_model_relation: adapter" in lines)
        assert ("base_model_relation: adapter" in lines) == named
        assert {"library_name: peft", "pipeline_tag: text-classification"} <= set(lines)
    card = model_card(model, nothing, "", "no place", place="user/name")
    assert "library_name: peft" not in head_of(card)
    assert 'load_adapter(model, "user/name")' in card and "from peft" not in card


def test_the_card_names_data_metric_classes_and_selection_with_their_errors(tmp_path):
    model = tiny("bert")
    model.config.id2label = {0: "late", 1: "fine"}
    selection = select(model, [batch(seed=seed) for seed in range(3)])
    prepare(model, selection.best)
    evaluation = {"rows": "test", "examples": 200, "before": {"f1": 0.5}, "after": {"f1": 0.8625}}
    evaluation |= {"best_on_validation": {"f1": 0.9}, "majority": {"class": "fine", "f1": 0.25}}
    about = {"data": "mail.csv, 860 rows", "evaluation": evaluation}
    save_adapter(model, tmp_path, selection, about=about)
    card = (tmp_path / "README.md").read_text()
    assert "Classes: late, fine.\n" in card and "\nmail.csv, 860 rows\n" in card
    assert "On 200 test rows, which no choice has seen:\n\n| | f1 |\n| --- | --- |\n" in card
    table = "| before training | 0.5000 |\n| always 'fine' | 0.2500 |\n| after training | 0.8625 |"
    assert table in card and "best on validation" not in card
    best, gains = selection.best, selection.gains
    assert f"{gains.values[best]:.3f}" in card and f"{gains.errors[best]:.3f}" in card
    facts = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]["beft_ext"]
    assert facts["data"] == about["data"] and facts["evaluation"] == evaluation
    assert facts["version"] == beft_ext.__version__
    about["evaluation"] = evaluation | {"after": None, "rows": "validation"}
    save_adapter(model, tmp_path, about=about)
    card = (tmp_path / "README.md").read_text()
    assert "| best on validation | 0.9000 |" in card and "which chose the epoch" in card
    save_adapter(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "## Evaluation" not in card and "## Data" not in card
