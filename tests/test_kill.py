"""Kill -9 at random moments of `beft-ext tune`, resumed each time: the same files, to the byte.

BEFT_KILLS=20 kills more often than the default; -s shows where each kill hit.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from beft_ext.tuning import CHECKPOINT

KILLS = int(os.environ.get("BEFT_KILLS", "3"))
DATA = Path(__file__).parent.parent / "beft_ext" / "tasks" / "sentiment"
# Children start in milliseconds, from a server in which nothing has run but these imports.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "pytest",
        "matplotlib.figure",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.bert.modeling_bert",
        "beft_ext.adapters",
        "beft_ext.cli",
        "beft_ext.plots",
        "beft_ext.workflow",
    ]
)


def run(arguments):
    from beft_ext.cli import main

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(main(arguments))


def start(arguments):
    process = SERVER.Process(target=run, args=(arguments,))
    process.start()
    return process


def finish(arguments):
    """Seconds of a run that nobody kills."""
    began = time.monotonic()
    process = start(arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def kill(process, seconds):
    """True where the run was still going after ``seconds``, and was killed."""
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def files(folder):
    """All but the checkpoint, whose header safetensors writes in any order."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != CHECKPOINT]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def where(folder):
    """What a kill left behind, in words."""
    from safetensors import safe_open

    path, step = folder / CHECKPOINT, 0
    if path.is_file():
        with safe_open(path, "pt") as file:
            step = json.loads(file.metadata()["progress"])["step"]
    kept = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return f"step {step}, {', '.join(kept)}"


@pytest.mark.parametrize("terms", ["value", "auto"])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tiny_folder, tmp_path, terms):
    arguments = ["tune", "--model", tiny_folder, "--terms", terms, "--save-every", "1"]
    arguments += ["--train-file", str(DATA / "train.jsonl"), "--train-size", "64"]
    arguments += ["--validation-file", str(DATA / "validation.jsonl")]
    arguments += ["--batch-size", "4", "--lr", "1e-2", "--epochs", "4", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(["doctor"])  # pays for the server's imports
    work = finish([*arguments, str(whole)])
    overhead = finish([*arguments, str(whole), "--resume"])  # nothing is left to train
    lifetime = overhead / 2 + (work - overhead) / KILLS
    chance, kills = random.Random(0), 0
    while kills < KILLS:
        resume = ["--resume"] if kills else []
        process = start([*arguments, str(parts), *resume])
        killed = kill(process, chance.expovariate(1 / lifetime))
        kills += killed
        print(f"{terms}: killed {kills} times, {where(parts)}" if killed else "ran to its end")
    finish([*arguments, str(parts), "--resume"])
    assert files(parts) == files(whole)
