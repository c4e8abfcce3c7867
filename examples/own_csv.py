"""A csv file with words as labels: which term to train, the adapter, and what it answers.

    python examples/own_csv.py [--model NAME] [--data FILE.csv] [--out FOLDER]

The file has the columns ``text`` and ``label``.
"""

from argparse import ArgumentParser
from pathlib import Path

import small_models
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import beft_ext
from beft_ext.tasks import HeadObjective, Task, read_rows

parser = ArgumentParser()
parser.add_argument("--model", default=None)
parser.add_argument("--data", default=Path(__file__).parent / "mail.csv", type=Path)
parser.add_argument("--out", default=Path("out/own_csv"), type=Path)
arguments = parser.parse_args()
name = arguments.model or small_models.encoder()

# Rows become examples: what the model reads, and the number of the class.
rows = list(read_rows(arguments.data))
classes = sorted({row["label"] for row in rows})
task = Task(text="{text}", label="label", classes=tuple(classes))
examples = task.examples(rows, str(arguments.data))
train, held_out = examples[:-15], examples[-15:]


def load():
    torch.manual_seed(0)  # of the new head
    names = dict(enumerate(classes))
    return AutoModelForSequenceClassification.from_pretrained(name, id2label=names)


model = load()
objective = HeadObjective(task, AutoTokenizer.from_pretrained(name))
loader = objective.training(train, 8, seed=0)
validation = objective.held_out(held_out, 64)

# What each term alone would explain of unseen rows, before any training.
selection = beft_ext.select(model, loader, steps=0)
print(selection, "\n")

print(beft_ext.prepare(model, selection.best), "\n")
run = beft_ext.tune(
    model,
    loader,
    evaluate=lambda m: objective.evaluate(m, validation, held_out)["accuracy"],
    recipe=beft_ext.Recipe(epochs=5, lr=1e-2),
)
for record in run.history:
    print("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
beft_ext.save_adapter(model, arguments.out / "adapter", selection)

# Elsewhere: the base model, and the adapter of a few kilobytes.
fresh = beft_ext.load_adapter(load(), arguments.out / "adapter")
print()
for example, place in zip(held_out[:5], objective.predict(fresh, validation), strict=False):
    print(f"{classes[place]:<10}{example.text}")
