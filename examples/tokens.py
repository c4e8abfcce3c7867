"""Token classification: a class for each token, here whether it is of a number.

    python examples/tokens.py [--model NAME] [--out FOLDER]

What a label of -100 marks does not count: padding, and what the tokenizer adds.
"""

from argparse import ArgumentParser
from pathlib import Path

import small_models
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

import beft_ext
from beft_ext.tasks import read_rows

parser = ArgumentParser()
parser.add_argument("--model", default=None)
parser.add_argument("--out", default=Path("out/tokens"), type=Path)
arguments = parser.parse_args()
name = arguments.model or small_models.encoder()

tokenizer = AutoTokenizer.from_pretrained(name)
texts = [row["text"] for row in read_rows(Path(__file__).parent / "mail.csv")]


def batch_of(texts):
    """``input_ids`` and ``labels`` are ``(B, T)``."""
    options = {"padding": True, "return_tensors": "pt", "return_special_tokens_mask": True}
    features = tokenizer(texts, return_offsets_mapping=True, **options)
    offsets, added = features.pop("offset_mapping"), features.pop("special_tokens_mask")
    labels = [
        [int(text[start:stop].strip().isdigit()) for start, stop in row.tolist()]
        for text, row in zip(texts, offsets, strict=True)
    ]
    return {**features, "labels": torch.tensor(labels).masked_fill(added.bool(), -100)}


batches = [batch_of(texts[i : i + 10]) for i in range(0, len(texts), 10)]
train, held_out = batches[:-2], batches[-2:]


def load():
    torch.manual_seed(0)  # of the new head
    names = {0: "word", 1: "number"}
    return AutoModelForTokenClassification.from_pretrained(name, id2label=names)


def found_of(model):
    """F1 of the numbers."""
    hits = said = there = 0
    for batch in held_out:
        with torch.no_grad():
            answers = model.eval()(**batch).logits.argmax(-1)
        counts = batch["labels"] >= 0
        hits += int((answers * batch["labels"])[counts].sum())
        said, there = said + int(answers[counts].sum()), there + int(batch["labels"][counts].sum())
    return 2 * hits / max(1, said + there)


model = load()
selection = beft_ext.select(model, train, steps=0)
print(selection, "\n")
print(beft_ext.prepare(model, selection.best), "\n")
recipe = beft_ext.Recipe(epochs=6, lr=1e-2)
run = beft_ext.tune(model, train, evaluate=found_of, recipe=recipe, metric="f1")
print("f1:", [round(record["f1"], 3) for record in run.history])
beft_ext.save_adapter(model, arguments.out / "adapter", selection)

fresh = beft_ext.load_adapter(load(), arguments.out / "adapter")
features = tokenizer("Order 4711 has cost me 25 euros", return_tensors="pt")
answers = fresh.eval()(**features).logits.argmax(-1)[0]
print("numbers:", tokenizer.decode(features["input_ids"][0][answers == 1]))
