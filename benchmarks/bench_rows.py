"""How do reading and tokenising grow with the number of rows, and the memory that they take?

A csv of short texts, in a process of its own for each size: until the first batch, and over a whole
pass. Memory is the process's, beyond what it had before. The host reads, so nothing is measured for
another device. Writes benchmarks/results/cpu/rows.json.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import settings, show, write
from transformers import AutoTokenizer

from beft_ext.commands import demo
from beft_ext.commands.sources import Source
from beft_ext.tasks import HeadObjective

SIZES = (20_000, 100_000, 1_000_000)  # the last one is more than are held
WORDS = [
    "a",
    "film",
    "of",
    "great",
    "charm",
    "that",
    "is",
    "never",
    "dull",
    "and",
    "always",
    "warm",
    "but",
    "slow",
    "in",
    "parts",
]
BATCH = 16


def table(folder: Path, rows: int) -> Path:
    """A csv of so many rows with 5 to 25 words, of two classes."""
    chance, path = random.Random(0), folder / f"{rows}.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("sentence,label\n")
        for _ in range(rows):
            text = " ".join(chance.choices(WORDS, k=chance.randint(5, 25)))
            file.write(f"{text},{chance.choice(('good', 'bad'))}\n")
    return path


def child(path: Path) -> None:
    """Print what a pass over the file takes, as JSON."""
    tokenizer = AutoTokenizer.from_pretrained(demo.minilm())
    tokenizer(["once"])  # what is loaded at the first call counts for no row
    before = _peak()
    start = time.perf_counter()
    source = Source(train_file=path)
    objective = HeadObjective(source.task, tokenizer)
    batches = iter(objective.training(source.training(), BATCH, seed=0))
    rows = len(next(batches)["labels"])
    first = time.perf_counter() - start
    rows += sum(len(batch["labels"]) for batch in batches)
    whole = time.perf_counter() - start
    found = {"first": first, "whole": whole, "rows": rows, "peak": _peak() - before}
    print(json.dumps(found))


def _peak() -> int:
    """Bytes. Linux alone tells them; what getrusage says begins with the parent's."""
    told = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(x.split()[1]) for x in told.splitlines() if x.startswith("VmHWM"))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
        return
    arguments = settings(__doc__, rounds=1)
    if arguments.device != "cpu":
        print("rows: the host reads them, whatever the device")
        return
    cases: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES[: 1 if arguments.quick else len(SIZES)]:
            command = [sys.executable, __file__, "--child", str(table(Path(folder), size))]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            for part in ("first", "whole"):
                seconds = dict.fromkeys(("median_s", "q1_s", "q3_s"), found[part])
                cases[f"{size:,} rows, {'first batch' if part == 'first' else 'a pass'}"] = seconds
            cases[f"{size:,} rows, a pass"] |= {
                "rows_per_s": found["rows"] / found["whole"],
                "peak_bytes": found["peak"],
            }
    show("rows", cases)
    write("rows", arguments, {"pass": {"csv": cases}})


if __name__ == "__main__":
    main()
