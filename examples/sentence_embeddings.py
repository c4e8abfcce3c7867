"""sentence-transformers: the bias term that brings texts of one topic near each other.

python examples/sentence_embeddings.py [--model NAME] [--out FOLDER]
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import small_models
import torch
from torch.nn.functional import cosine_similarity

import beft_ext
from beft_ext.tasks import read_rows

try:
    from sentence_transformers import SentenceTransformer
except ImportError:
    sys.exit("this example needs sentence-transformers: pip install 'beft-ext[sentences]'")

parser = ArgumentParser()
parser.add_argument("--model", default=None)
parser.add_argument("--out", default=Path("out/sentence_embeddings"), type=Path)
arguments = parser.parse_args()
name = arguments.model or small_models.encoder()

# Pairs of texts: 1 where both are of one topic, 0 where they are not.
rows = list(read_rows(Path(__file__).parent / "mail.csv"))
pairs = [(a, b) for i, a in enumerate(rows) for b in (rows[i - 3], rows[i - 1])]

model = SentenceTransformer(name, device="cpu")


def batch_of(pairs):
    """Arguments that the loss below knows what to do with; ``labels`` has a row for each pair."""
    made = {"labels": torch.tensor([float(a["label"] == b["label"]) for a, b in pairs])}
    for side in (0, 1):
        texts = [pair[side]["text"] for pair in pairs]
        features = model.tokenizer(texts, padding=True, return_tensors="pt")
        made |= {f"{key}_{side}": features[key] for key in ("input_ids", "attention_mask")}
    return made


def loss(_, batch):
    """The losses of the pairs, by the wrapper's own call."""
    embedded = (
        model({key: batch[f"{key}_{side}"] for key in ("input_ids", "attention_mask")})
        for side in (0, 1)
    )
    similar = cosine_similarity(*(found["sentence_embedding"] for found in embedded))
    return (similar - batch["labels"]) ** 2


batches = [batch_of(pairs[i : i + 16]) for i in range(0, len(pairs), 16)]
train, held_out = batches[:-2], batches[-2:]

# The wrapper is taken as it is; names of biases are those of the model inside.
selection = beft_ext.select(model, train, loss=loss, steps=0)
print(selection, "\n")
print(beft_ext.prepare(model, selection.best), "\n")
recipe = beft_ext.Recipe(epochs=4, lr=3e-3)
run = beft_ext.tune(model, train, evaluate=held_out, recipe=recipe, loss=loss)
print("validation loss:", [round(record["validation_loss"], 4) for record in run.history])
beft_ext.save_adapter(model, arguments.out / "adapter", selection)

fresh = SentenceTransformer(name, device="cpu")
beft_ext.load_adapter(fresh, arguments.out / "adapter")
texts = ["Where is my parcel?", "The van did not come", "I was charged twice"]
asked, same, other = torch.from_numpy(fresh.encode(texts))
print(f"same topic {cosine_similarity(asked, same, dim=0):.2f}, ", end="")
print(f"another {cosine_similarity(asked, other, dim=0):.2f}")
