"""The command line under several processes: the result of one, one voice, one exit code."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import free_port
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from beft_ext.commands.cli import main
from beft_ext.training.tuning import CHECKPOINT

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch has no gloo",
)


@pytest.fixture(scope="module")
def given(tiny_folder, tmp_path_factory):
    """Arguments: a model without dropout, and a file of rows."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(tiny_folder, folder / "model")
    path = folder / "model" / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | still))
    words = ["good", "fine", "bad", "poor", "so so", "well made", "dull", "bright"]
    rows = [f"{words[i % 8]} {words[i // 8]} {'abc'[i % 3]},{i * 7 % 5 % 2}" for i in range(21)]
    (folder / "rows.csv").write_text("\n".join(["sentence,label", *rows, ""]))
    train = ["--train-file", folder / "rows.csv", "--validation-file", folder / "rows.csv"]
    return [str(a) for a in ("--model", folder / "model", *train, "--batch-size", 5)]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Without a GPU it starts one process, unless it is told so.
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
ACCELERATE += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


def test_select_finds_what_one_process_finds_and_rank_0_says_it(launch, given, tmp_path):
    started = TORCHRUN
    if importlib.util.find_spec("accelerate") is not None:
        started = (*ACCELERATE, "--main_process_port", free_port())
    codes, said = launch(1, *started, "-m", "beft_ext", "select", *given, "--out", tmp_path / "two")
    assert codes == [0], said[0][1]
    assert said[0][0].count("written to") == 1
    assert main(["select", *given, "--out", str(tmp_path / "one")]) == 0
    two, one = (
        json.loads((tmp_path / name / "selection.json").read_text()) for name in ("two", "one")
    )
    assert two["best"] == one["best"] and two["steps"] == one["steps"] == 5
    assert two["gains"]["values"] == pytest.approx(one["gains"]["values"], rel=1e-4, abs=1e-5)
    assert two["gains"]["chance"] == pytest.approx(one["gains"]["chance"], abs=1e-9)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)


TUNE = ("--terms", "value", "--epochs", "8", "--lr", "1e-2", "--save-every", "1", "--resume")


@pytest.fixture(scope="module")
def tuned(launch, given, tmp_path_factory):
    """A folder that two ranks have tuned into, and what torchrun printed."""
    out = tmp_path_factory.mktemp("tuned")
    codes, said = launch(1, *TORCHRUN, "-m", "beft_ext", "tune", *given, *TUNE, "--out", out)
    assert codes == [0], said[0][1]
    return out, said[0][0]


def test_torchrun_tunes_what_one_process_tunes(given, tuned, tmp_path):
    assert tuned[1].count("the adapter is in") == 1
    assert main(["tune", *given, *TUNE, "--out", str(tmp_path)]) == 0
    one, two = (
        load_file(out / "adapter" / "adapter_model.safetensors") for out in (tmp_path, tuned[0])
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    records = (tuned[0] / "log.jsonl").read_text().splitlines()
    assert [json.loads(r)["step"] for r in records] == list(range(5, 45, 5))


# The rows are more than are held.
STREAMED = """
import sys
from beft_ext.commands.cli import main
from beft_ext.tasks import rows, streams
rows.HELD, streams.BUFFER = 8, 4
sys.exit(main(sys.argv[1:]))
"""


def test_auto_races_and_trains_on_a_stream_in_two_processes(launch, given, tmp_path):
    more = ["--epochs", "1", "--lr", "auto", "--audition-budget", "30", "--out", tmp_path]
    codes, said = launch(2, "-c", STREAMED, "tune", *given, *more)
    assert codes == [0, 0], said[0][1]
    assert "won at" in said[0][0] and said[1][0] == ""
    written = {p.name for p in Path(tmp_path).iterdir()}
    assert {"adapter", "selection", "audition.json", "log.jsonl"} <= written


def test_compare_compares_in_two_processes(launch, given, tmp_path):
    more = ["--methods", "auto,lora", "--seeds", "1", "--epochs", "1", "--out", tmp_path]
    codes, said = launch(2, "-m", "beft_ext", "compare", *given, *more)
    assert codes == [0, 0], said[0][1]
    assert "table and plot" in said[0][0] and said[1][0] == ""
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["method"] for run in runs] == ["auto", "lora"]
    assert all(run["failure"] is None for run in runs)


def files(folder):
    """What a run leaves, but for its pictures and its checkpoint."""
    paths = [*sorted((folder / "adapter").iterdir()), folder / "evaluation.json"]
    return {p.name: p.read_bytes() for p in [*paths, folder / "log.jsonl"]}


def step_of(folder):
    """The step that the checkpoint stands at; -1 without one."""
    if not (folder / CHECKPOINT).is_file():
        return -1
    with safe_open(folder / CHECKPOINT, "np") as file:
        return json.loads(file.metadata()["progress"])["step"]


def rank_of(process):
    """The rank of a process by its environment; None for one that is none, or is gone."""
    try:
        facts = (Path("/proc") / str(process) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(f[5:]) for f in facts if f.startswith(b"RANK=")), None)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_rank_that_is_killed_is_started_again_and_ends_in_the_same_bytes(given, tuned, tmp_path):
    command = (*TORCHRUN, "--max-restarts", "1", "-m", "beft_ext", "tune", *given, *TUNE)
    command = [sys.executable, *command, "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w+") as said, subprocess.Popen(
        command, env=environment, stdout=said, stderr=said
    ) as job:  # fmt: skip
        try:
            while step_of(tmp_path) < 6 and job.poll() is None:
                time.sleep(0.005)
            children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            os.kill(next(int(c) for c in children if rank_of(c) == 1), signal.SIGKILL)
            struck = step_of(tmp_path)
            code = job.wait(timeout=170)
        finally:
            job.terminate()  # which ends its ranks
        said.seek(0)
        assert code == 0, said.read()[-3000:]
    assert 6 <= struck < 40  # of 8 epochs of 5 steps
    assert files(tmp_path) == files(tuned[0])


def test_several_processes_without_gloo(given, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    ignored = signal.getsignal(signal.SIGTERM)
    assert main(["select", *given, "--out", str(tmp_path)]) == 2
    signal.signal(signal.SIGTERM, ignored)
    said = capsys.readouterr().err
    assert said == (
        "beft-ext: several processes need torch's gloo backend, which is missing here\n"
    )


def test_ranks_divide_a_stream_as_they_divide_rows_that_are_held(launch, given, tmp_path):
    for size, name in ((1, "one"), (2, "two")):
        more = ["--steps", "7", "--out", tmp_path / name]
        codes, said = launch(size, "-c", STREAMED, "select", *given, *more)
        assert codes == [0] * size, said[0][1]
    two, one = (
        json.loads((tmp_path / name / "selection.json").read_text()) for name in ("two", "one")
    )
    assert two["gains"]["values"] == pytest.approx(one["gains"]["values"], rel=1e-4, abs=1e-5)
    assert two["gains"]["examples"] == one["gains"]["examples"] == 21
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and len(one["losses"]) == 7


# Commands one after another in the same processes, each in a folder of its rank's own, and with a
# store of its own, as torchrun would give it.
SEVERAL = """
import json, os, sys
import torch
from beft_ext.commands.cli import main
from beft_ext.tasks import rows, streams
from beft_ext.training.steps import EagerStep

def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

rank, forward, held = int(os.environ["RANK"]), EagerStep._forward, rows.HELD
for job in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = job["port"]
    os.chdir(job["folders"][rank])
    rows.HELD = 8 if job["how"] == "streamed" else held
    EagerStep._forward = full if job["how"] == "full" and rank == 1 else forward
    code = main(job["commands"][rank])
    print("code", code, file=sys.stderr, flush=True)
"""
FILES = ("--train-file", "rows.csv", "--validation-file", "other.csv", "--batch-size", "5")
USUAL = ("--model", "model", *FILES, "--out", "out")
TRAIN = ("tune", *USUAL, "--terms", "value", "--epochs", "1")
ROWS, MODEL = "rank 1 and rank 0 differ in the rows or the tokenizer", "differ in the model"
AHEAD = "start all ranks with the same"
# The command, what is other on rank 1, and the sentence.
BAD = {
    "no file": (["select", *USUAL, "--train-file", "none.csv"], None, "none.csv"),
    "a verb of one": (
        ["merge", "--model", "model", "--adapter", "none", "--out", "out"], None,
        "beft-ext merge is for one process, and 2 were started: start it without torchrun",
    ),
    "no row": (["select", *USUAL, "--batch-size", "1"], None, "rank 1 has no row: 21 in batches"),
    "no row of a stream": (
        ["select", *USUAL, "--batch-size", "1"], "streamed", "rank 1 has no row: rows in batches of"
    ),
    "a device map": (
        ["select", *USUAL, "--device-map", "auto"], None, "--device-map is for one process: start"
    ),
    "other arguments": (
        ["select", *USUAL], ["--seed", "1"], f"rank 1 and rank 0 differ in the arguments: {AHEAD}"
    ),
    "other training rows": (["select", *USUAL], "rows.csv", f"{ROWS}: {AHEAD}"),
    "other rows that judge": ([*TRAIN, "--lr", "1e-2"], "other.csv", f"{ROWS}: {AHEAD}"),
    "other rows that are evaluated": (["evaluate", *USUAL[:-4], *USUAL[-2:]], "other.csv", ROWS),
    "other rows that are compared": (
        ["compare", *USUAL, "--methods", "value", "--seeds", "1"], "other.csv",
        f"nothing worked; the first failure: WorkflowError: {ROWS}",
    ),
    "another model": (["select", *USUAL], "model", f"{MODEL}: {AHEAD}"),
    "another model that is evaluated": (["evaluate", *USUAL[:-4], *USUAL[-2:]], "model", MODEL),
    "another model that is raced": ([*TRAIN, "--lr", "auto"], "model", MODEL),
    "another model that is trained": ([*TRAIN, "--lr", "1e-2"], "model", "differ in model"),
    "memory of one rank": (
        [*TRAIN, "--lr", "1e-2"], "full",
        "rank 1: the GPU is out of memory (20.00 MiB were asked for): lower --batch-size (5) or",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def refused(launch, given, tmp_path_factory):
    """Exit codes of all ranks for each of BAD, and what they printed."""
    home, others = tmp_path_factory.mktemp("ranks"), ("rows.csv", "other.csv", "model")
    model, rows = home / "headed", Path(given[3]).read_text()
    shutil.copytree(given[1], model)
    AutoModelForSequenceClassification.from_pretrained(given[1]).save_pretrained(model)

    def folder(odd):
        """With something in it that other ranks do not have."""
        own = home / (odd or "usual")
        if not own.exists():
            shutil.copytree(model, own / "model")
            for name in ("rows.csv", "other.csv"):
                (own / name).write_text(rows.replace("dull", "odd") if name == odd else rows)
            if odd == "model":
                path = own / "model" / "model.safetensors"
                tensors = load_file(path)
                tensors[min(tensors)] += 1
                save_file(tensors, path, {"format": "pt"})
        return str(own)

    jobs = []
    for command, odd, _ in BAD.values():
        second = [*command, *odd] if isinstance(odd, list) else command
        folders = [folder(None), folder(odd if odd in others else None)]
        how = odd if odd in ("streamed", "full") else None
        job = {"port": free_port(), "folders": folders, "commands": [command, second], "how": how}
        jobs.append(job)
    codes, said = launch(2, "-c", SEVERAL, json.dumps(jobs))
    assert codes == [0, 0], said
    told = [re.split(r"^code (\d+)\n", err, flags=re.MULTILINE) for _, err in said]
    return {name: [(int(own[2 * i + 1]), own[2 * i]) for own in told] for i, name in enumerate(BAD)}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_on_rank_0_and_exit_code_2_on_all(refused, name):
    (code, first), (other, second) = refused[name]
    assert (code, other) == (2, 2), first
    own = [line for line in first.splitlines() if line.startswith("beft-ext: ")]
    assert len(own) == 1 and BAD[name][2] in own[0]
    assert "beft-ext: " not in second
