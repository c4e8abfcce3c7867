"""A small decoder trained from scratch, for the tables whose own models are out of reach.

    python benchmarks/paper/decoder.py --out out/paper/decoder               # as OPT, with biases
    python benchmarks/paper/decoder.py --out out/paper/plain --bias-free     # as LLaMA, without

Trains a tokenizer and a model of 4 layers x 128 on the text of grammar.py, plain sentences and
the package's prompts with answers of which a part is wrong, on one core in some minutes. OUT is
a folder for --model, OUT/data one for --data: rows that were not trained on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grammar
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from beft_ext.files import whole_file
from beft_ext.tasks import PromptObjective, named_task

END, PAD = "</s>", "<pad>"
TRAINING_SEED, TASK_SEED = 1, 2
ROWS = {"train": 1000, "validation": 500}
DOCUMENTS, WRONG, UNASKED = 20_000, 0.15, 0.25  # shares of wrong answers, of sentences alone
STEPS, BATCH, LR, LONGEST = 800, 16, 3e-3, 128
ANSWER = 10.0  # what a token of an answer weighs
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 1024}
ABOUT = "generated: rows of benchmarks/paper/grammar.py, not the task's own data"


def documents(count: int, seed: int = TRAINING_SEED) -> Iterator[tuple[str, str]]:
    """Text and answer: prompts with one that is wrong in WRONG of them; sentences with none."""
    draw = random.Random(seed)
    for _ in range(count):
        name = draw.choice(list(grammar.MAKERS))
        task = named_task(name)
        example = task.examples([grammar.MAKERS[name](draw)], name)[0]
        if name == "squad":
            answer = f" {example.answers[0]}\n"
        else:
            wrong = draw.random() < WRONG
            answer = example.options[1 - int(example.label) if wrong else int(example.label)]
        if draw.random() < UNASKED:
            yield f"{example.text} {example.pair or ''}".strip() + "\n", ""
        else:
            yield example.prompt, answer


def tokenizer_of(texts: Sequence[str]) -> Any:
    """Byte-level pieces, one for each frequent word."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token=END, pad_token=PAD
    )


def model_of(tokenizer: Any, bias_free: bool, seed: int = 0) -> torch.nn.Module:
    """An untrained model for the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    ends = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    if bias_free:
        config = transformers.LlamaConfig(**SIZES, **ends, intermediate_size=344)
        return transformers.LlamaForCausalLM(config)
    plain = {"ffn_dim": 512, "word_embed_proj_dim": 128, "dropout": 0.0}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, **ends, **plain))


def train(
    model: torch.nn.Module, tokenizer: Any, texts: Sequence[tuple[str, str]], steps: int
) -> list[float]:
    """AdamW on texts with answers in seeded order, an answer's tokens weighing ANSWER times as
    much as others, the rate falling linearly. Returns each step's loss."""
    whole = tokenizer([prompt + answer for prompt, answer in texts])["input_ids"]
    starts = map(len, tokenizer([prompt.rstrip(" ") for prompt, _ in texts])["input_ids"])
    rows = [([*ids[: LONGEST - 1], 0], at) for ids, at in zip(whole, starts, strict=True)]
    draw, losses = random.Random(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    model.train()
    for step in range(steps):
        loss = _loss(model, draw.sample(rows, min(BATCH, len(rows))))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / 50, 1 - step / steps)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 100 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    return losses


def _loss(model: torch.nn.Module, rows: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Weighted mean cross-entropy of the next token. rows: tokens, and where the answer starts."""
    tokens = [torch.tensor(ids) for ids, _ in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=1)
    starts = torch.tensor([at for _, at in rows])[:, None]
    logits = model(input_ids=ids, attention_mask=(ids != 1).long()).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    places = torch.arange(1, ids.shape[1])[None]
    answer = (places >= starts) & (ids[:, 1:] != 0)
    weight = (1.0 + (ANSWER - 1.0) * answer) * (ids[:, 1:] != 1)
    return (losses * weight).sum() / weight.sum()


def write_tasks(folder: Path, sizes: dict[str, int]) -> None:
    """``folder/TASK/SPLIT.jsonl`` of every task, and what they are in about.txt."""
    for task in grammar.MAKERS:
        # One draw for both splits: no row of the one is in the other.
        rows = iter(grammar.rows(task, sum(sizes.values()), TASK_SEED))
        for split, count in sizes.items():
            lines = [json.dumps(next(rows)) + "\n" for _ in range(count)]
            with whole_file(folder / task / f"{split}.jsonl") as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
    with whole_file(folder / "about.txt") as temporary:
        temporary.write_text(ABOUT + "\n", encoding="utf-8")


def accuracies(model: torch.nn.Module, tokenizer: Any, folder: Path) -> dict[str, float]:
    """What the model answers right without further training, by task."""
    from beft_ext.tasks import load_task

    found = {}
    for name in grammar.MAKERS:
        task, examples = named_task(name), load_task(name, "validation", folder)[:200]
        objective = PromptObjective(task, tokenizer, model)
        batches = objective.held_out(examples, 50)
        found[name] = objective.evaluate(model, batches, examples)[task.metric]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--bias-free", action="store_true")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS["train"], help="of each task")
    a = parser.parse_args(argv)
    texts = list(documents(a.documents))
    tokenizer = tokenizer_of([prompt + answer for prompt, answer in texts])
    model = model_of(tokenizer, a.bias_free)
    train(model, tokenizer, texts, a.steps)
    tokenizer.save_pretrained(a.out)
    model.save_pretrained(a.out)
    write_tasks(a.out / "data", {"train": a.rows, "validation": a.rows // 2})
    for name, value in accuracies(model, tokenizer, a.out / "data").items():
        print(f"{name}: {value:.3f} without training on it")


if __name__ == "__main__":
    main()
