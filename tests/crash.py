"""What becomes of files when a process dies, a disk is full, a bit flips, or two write at once.

    python tests/crash.py --rounds 200

Each part writes the package's own files in child processes, breaks something at a random moment,
reads what is left, and counts: whole (the old or the new files), refused (an error of ours), and
wrong (anything else), which must be 0. tests/test_crash.py runs a few rounds of each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from conftest import batch, tiny

from beft_ext import load_adapter, merge_adapter, prepare, save_adapter, select
from beft_ext.errors import BeftError
from beft_ext.files import PARTIAL, whole_files
from beft_ext.selection import read_selection
from beft_ext.training.preparation import prepared_of
from beft_ext.training.tuning import Recipe, tune

CONTEXT = multiprocessing.get_context("fork")
RECIPE = Recipe(epochs=2, lr=1e-2)


def marked(mark: float) -> torch.nn.Module:
    """A prepared model whose trained biases are all ``mark`` more than before."""
    model = tiny("bert")
    for bias in prepare(model, "value").biases:
        with torch.no_grad():
            model.get_parameter(bias.parameter).add_(mark)
    return model


def mark_of(folder: Path) -> float:
    """Which of the marked adapters lies in ``folder``; AdapterError where none does."""
    model, base = tiny("bert"), tiny("bert")
    load_adapter(model, folder)
    names = [n for n, _ in model.named_parameters() if n.endswith("self.value.bias")]
    found = {
        round(float(d), 3)
        for n in names
        for d in (model.get_parameter(n) - base.get_parameter(n)).flatten()
    }
    assert len(found) == 1, f"a mixture of {found}"
    return found.pop()


def trained(folder: Path, resume: bool = False) -> None:
    """A short run with its checkpoint."""
    torch.set_num_threads(1)
    model = marked(0.0)
    loader = [batch(seed=i) for i in range(4)]
    tune(model, loader, lambda _: 0.0, folder, RECIPE, resume=resume, save_every=1)


def selected(folder: Path) -> None:
    select(tiny("bert"), [batch(seed=i) for i in range(3)]).save(folder)


def merged(folder: Path) -> None:
    model = marked(0.5)
    merge_adapter(model)
    with whole_files(folder, last="config.json") as temporary:
        model.save_pretrained(temporary)


def saving(folder: Path, mark: float, times: int) -> None:
    model = marked(mark)
    for _ in range(times):
        save_adapter(model, folder)


def kills(rounds: int, chance: random.Random) -> Counter[str]:
    """kill -9 of a process that saves one adapter over another again and again."""
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp())
    save_adapter(marked(0.5), folder)
    for i in range(rounds):
        process = CONTEXT.Process(target=saving, args=(folder, (0.25, 0.5)[i % 2], 10_000))
        process.start()
        time.sleep(chance.uniform(0.15, 0.3))
        process.kill()
        process.join()
        found[_read(lambda: mark_of(folder) in (0.25, 0.5))] += 1
    save_adapter(marked(0.25), folder)
    found["left over"] = len(list(folder.glob(PARTIAL + "*")))
    shutil.rmtree(folder)
    return found


def full_disk(rounds: int, chance: random.Random) -> Counter[str]:
    """A limit on the size of files, which fails a write in its middle as a full disk does."""
    found: Counter[str] = Counter()
    for i in range(rounds):
        folder = Path(tempfile.mkdtemp())
        work = (lambda f: save_adapter(marked(0.5), f), trained, selected, merged)[i % 4]
        work(folder)
        before = _contents(folder)
        process = CONTEXT.Process(target=_limited, args=(work, folder, chance.randint(0, 12_000)))
        process.start()
        process.join()
        left = list(folder.glob(PARTIAL + "*"))
        whole = work is trained or process.exitcode == 0 or _contents(folder) == before
        outcomes = {0: "whole", 2: "refused"}
        found["wrong" if left or not whole else outcomes.get(process.exitcode, "wrong")] += 1
        shutil.rmtree(folder)
    return found


def flips(rounds: int, chance: random.Random) -> Counter[str]:
    """One bit of one file turned over; the file is then read as ever."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    save_adapter(marked(0.5), folder / "adapter")
    trained(folder / "run")
    selected(folder / "selection")
    readers = {
        "adapter/adapter_model.safetensors": lambda: mark_of(folder / "adapter"),
        "adapter/adapter_config.json": lambda: mark_of(folder / "adapter"),
        "run/checkpoint.safetensors": lambda: trained(folder / "run", resume=True),
        "selection/selection.json": lambda: read_selection(folder / "selection"),
        "selection/biases.safetensors": lambda: read_selection(folder / "selection"),
    }
    found: Counter[str] = Counter()
    for name, read in readers.items():
        read()
        data = (folder / name).read_bytes()
        for _ in range(rounds):
            bad, place = bytearray(data), chance.randrange(8 * len(data))
            bad[place // 8] ^= 1 << place % 8
            (folder / name).write_bytes(bad)
            try:
                read()
                found[f"wrong: bit {place} of {name} passed"] += 1
            except BeftError:
                found["refused"] += 1
        (folder / name).write_bytes(data)
        read()
    shutil.rmtree(folder)
    return found


def two_writers(rounds: int, _: random.Random) -> Counter[str]:
    """Two processes that save their own adapter into one folder, and one that reads it."""
    torch.set_num_threads(1)
    folder, found = Path(tempfile.mkdtemp()), Counter[str]()
    work = [(folder, mark, max(2, rounds)) for mark in (0.25, 0.5)]
    writers = [CONTEXT.Process(target=saving, args=w) for w in work]
    for writer in writers:
        writer.start()
    while any(w.exitcode is None for w in writers):
        found[_read(lambda: mark_of(folder) in (0.25, 0.5))] += 1
    found["wrong"] += sum(w.exitcode != 0 for w in writers)
    found["left over"] = len(list(folder.glob(PARTIAL + "*")))
    shutil.rmtree(folder)
    return found


PARTS = {
    "kill -9": kills,
    "full disk": full_disk,
    "flipped bits": flips,
    "two writers": two_writers,
}


def _read(whole):
    try:
        return "whole" if whole() else "wrong"
    except BeftError:
        return "refused"
    except AssertionError:
        return "wrong"


def _contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _limited(work, folder: Path, size: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        work(folder)
    except (BeftError, OSError):
        raise SystemExit(2) from None
    except Exception as error:  # transformers' own error, which the command line makes one line
        raise SystemExit(2 if "too large" in str(error) else 3) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    assert prepared_of(tiny("bert")) is None  # imports all that the children need, once
    wrong = 0
    for name, part in PARTS.items():
        found = part(arguments.rounds, random.Random(arguments.seed))
        bad = sum(n for k, n in found.items() if k.startswith(("wrong", "left")))
        print(f"{name:<14}" + ", ".join(f"{k}: {n}" for k, n in sorted(found.items())), flush=True)
        wrong += bad
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
