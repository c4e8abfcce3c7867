"""The Trainer of transformers: scores in its logs, an adapter in each checkpoint, and resuming.

python examples/trainer.py [--model NAME] [--out FOLDER]
"""

from argparse import ArgumentParser
from pathlib import Path

import small_models
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import beft_ext
from beft_ext.integrations.trainer import AdapterCallback, log_scores
from beft_ext.tasks import read_rows

parser = ArgumentParser()
parser.add_argument("--model", default=None)
parser.add_argument("--out", default=Path("out/trainer"), type=Path)
arguments = parser.parse_args()
name = arguments.model or small_models.encoder()

classes = ["delivery", "praise", "refund"]
tokenizer = AutoTokenizer.from_pretrained(name)
rows = [
    {**tokenizer(row["text"]), "labels": classes.index(row["label"])}
    for row in read_rows(Path(__file__).parent / "mail.csv")
]


def load():
    torch.manual_seed(0)  # of the new head
    names = dict(enumerate(classes))
    return AutoModelForSequenceClassification.from_pretrained(name, id2label=names)


def trainer_of(model):
    """A Trainer like any other, but for the optimizer and two callbacks."""
    made = Trainer(
        model,
        TrainingArguments(
            str(arguments.out),
            num_train_epochs=4,
            per_device_train_batch_size=8,
            logging_steps=3,
            save_strategy="epoch",
            eval_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows[:-15],
        eval_dataset=rows[-15:],
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(beft_ext.BiasAdamW(model, lr=1e-2), None),
    )
    made.add_callback(AdapterCallback())
    log_scores(made)
    return made


model = load()
print(beft_ext.prepare(model, "value"), "\n")
trainer_of(model).train()
checkpoints = sorted(arguments.out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
print("\nadapters:", *(checkpoint / "adapter" for checkpoint in checkpoints), sep="\n")

# Resumed in the middle: a model that is prepared in the same way, and the Trainer's checkpoint.
resumed = load()
beft_ext.prepare(resumed, "value")
trainer_of(resumed).train(resume_from_checkpoint=str(checkpoints[1]))

# For use, the adapter alone.
used = beft_ext.load_adapter(load(), checkpoints[-1] / "adapter").eval()
with torch.no_grad():
    answers = used(**tokenizer("You charged me twice", return_tensors="pt")).logits
print("\nYou charged me twice:", classes[int(answers.argmax())])
