"""kill -9 at random moments of ``tune``, resumed each time: the same files, to the byte.

BEFT_KILLS sets how often a run is killed.
"""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from beft_ext.commands.demo import DATA
from beft_ext.files import PARTIAL
from beft_ext.training.tuning import CHECKPOINT

KILLS = int(os.environ.get("BEFT_KILLS", "3"))
STEPS = 10  # an epoch


def tune(model, rows, out, terms, epochs, resume):
    """In a process of its own, which comes from a server that has imported everything."""
    import contextlib

    import torch

    from beft_ext.commands.cli import main

    torch.set_num_threads(1)
    args = ["tune", "--model", model, "--epochs", str(epochs)]
    args += ["--train-file", rows, "--validation-file", rows, "--batch-size", "4"]
    args += ["--save-every", "1", "--terms", terms, "--out", out, "--lr", "1e-2"]
    with contextlib.redirect_stdout(None):
        raise SystemExit(main([*args, *(["--resume"] if resume else [])]))


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["beft_ext.commands.cli", "beft_ext.commands.tuning", "beft_ext.adapters"]
    )
    return context


def files(folder):
    """What a run leaves, but for its pictures and its checkpoint."""
    kept = ("adapter", "selection")
    paths = [p for d in kept for p in sorted((Path(folder) / d).glob("*")) if p.suffix != ".png"]
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in [*paths, Path(folder) / "log.jsonl"]
    }


def step_of(out):
    """The step that the checkpoint in ``out`` stands at; -1 without one."""
    path = out / CHECKPOINT
    if not path.is_file():
        return -1
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["progress"])["step"]


@pytest.mark.parametrize("terms", ["value", "auto"])
def test_a_run_that_is_killed_ends_as_one_that_is_not(server, tiny_folder, tmp_path, terms):
    epochs, chance = max(2, KILLS // 2), random.Random(KILLS)

    rows = tmp_path / "rows.jsonl"
    lines = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[: 4 * STEPS]))

    def start(out, resume):
        arguments = (tiny_folder, str(rows), str(tmp_path / out), terms, epochs, resume)
        process = server.Process(target=tune, args=arguments)
        process.start()
        return process, time.monotonic()

    whole, begun = start("whole", False)
    while step_of(tmp_path / "whole") < 0 and whole.exitcode is None:
        time.sleep(0.01)
    first = time.monotonic() - begun
    whole.join()
    assert whole.exitcode == 0
    struck, total = [], epochs * STEPS
    while len(struck) < KILLS:
        process, _ = start("killed", bool(struck))
        if chance.random() < 0.25:  # while it loads, or selects
            process.join(chance.uniform(0.0, 1.0) * first)
        else:  # in a step, an evaluation, or a write
            ahead = step_of(tmp_path / "killed") + chance.randint(1, 3 * total // (2 * KILLS))
            while step_of(tmp_path / "killed") < ahead and process.exitcode is None:
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.03))
        assert process.exitcode is None, f"over before kill {len(struck) + 1}: {struck}"
        process.kill()
        process.join()
        struck.append(step_of(tmp_path / "killed"))
    print(f"killed after steps {struck} of {total}")
    process, _ = start("killed", True)
    process.join()
    assert process.exitcode == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(PARTIAL + "*"))
