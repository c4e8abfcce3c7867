"""A language model without biases that is asked by a prompt: biases are added, trained, merged.

python examples/decoder_prompts.py [--model NAME] [--out FOLDER]
"""

from argparse import ArgumentParser
from pathlib import Path

import small_models
from transformers import AutoModelForCausalLM, AutoTokenizer

import beft_ext
from beft_ext.tasks import PromptObjective, Task, read_rows

parser = ArgumentParser()
parser.add_argument("--model", default=None)
parser.add_argument("--out", default=Path("out/decoder_prompts"), type=Path)
arguments = parser.parse_args()
name = arguments.model or small_models.decoder()

# The model ranks what it may say next. Its answer is the option that it finds most likely.
classes = ("delivery", "praise", "refund")
prompt = "Customer: {text}.\nThis is about:"
task = Task(text="{text}", classes=classes, prompt=prompt, options=tuple(f" {c}" for c in classes))
data = Path(__file__).parent / "mail.csv"
examples = task.examples(read_rows(data), str(data))
train, held_out = examples[:-15], examples[-15:]

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
objective = PromptObjective(task, tokenizer, model)
loader = objective.training(train, 8, seed=0)
validation = objective.held_out(held_out, 64)

# No projection has a bias. The gains tell what a bias would do if it were there.
gains = beft_ext.measure_gains(model, loader, observe=objective.observe)
print(gains, "\n")

# The value: one that a plain LLaMA, Gemma or Qwen3 has a place for when it is merged.
print(beft_ext.prepare(model, "value"), "\n")
run = beft_ext.tune(
    model,
    loader,
    evaluate=lambda m: objective.evaluate(m, validation, held_out)["accuracy"],
    recipe=beft_ext.Recipe(epochs=3, lr=1e-2),
    loss=objective.loss,
)
print("accuracy:", [round(record["accuracy"], 3) for record in run.history])
beft_ext.save_adapter(model, arguments.out / "adapter")
beft_ext.merge_adapter(model).save_pretrained(arguments.out / "merged")
tokenizer.save_pretrained(arguments.out / "merged")

plain = AutoModelForCausalLM.from_pretrained(arguments.out / "merged")
place = objective.predict(plain, validation)[0]
print(f"merged: {classes[place]}: {held_out[0].text}")
