"""The command line under several processes: the result of one, one voice, one exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

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


def test_select_finds_what_one_process_finds_and_rank_0_says_it(launch, given, tmp_path):
    codes, said = launch(2, "-m", "beft_ext", "select", *given, "--out", tmp_path / "two")
    assert codes == [0, 0], said[0][1]
    assert "written to" in said[0][0] and said[1][0] == ""
    assert main(["select", *given, "--out", str(tmp_path / "one")]) == 0
    two, one = (
        json.loads((tmp_path / name / "selection.json").read_text()) for name in ("two", "one")
    )
    assert two["best"] == one["best"] and two["steps"] == one["steps"] == 5
    assert two["gains"]["values"] == pytest.approx(one["gains"]["values"], rel=1e-4, abs=1e-5)
    assert two["gains"]["chance"] == pytest.approx(one["gains"]["chance"], abs=1e-9)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
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


def test_auto_races_and_trains_in_two_processes(launch, given, tmp_path):
    more = ["--epochs", "1", "--lr", "auto", "--out", tmp_path]
    codes, said = launch(2, "-m", "beft_ext", "tune", *given, *more)
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


def test_ranks_that_read_other_rows_are_told_apart(launch, given, tmp_path):
    own = (
        "import os, sys; from beft_ext.commands.cli import main; os.chdir(sys.argv[1] + os.environ"
    )
    own += "['RANK']); sys.exit(main(sys.argv[2:]))"
    rows = Path(given[3]).read_text()
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "rows.csv").write_text(rows.replace("dull", "ab"[rank]))
    files = ["--train-file", "rows.csv", "--validation-file", "rows.csv", "--out", "out"]
    codes, said = launch(2, "-c", own, f"{tmp_path}/", "select", *given[:2], *files)
    assert codes == [2, 2], said
    assert "rank 1 and rank 0 differ in the rows or the tokenizer" in said[0][1]
    assert "beft-ext: " not in said[1][1]


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


STREAMED = """
import sys
from beft_ext.commands.cli import main
from beft_ext.tasks import rows, streams
rows.HELD, streams.BUFFER = 8, 4
sys.exit(main(sys.argv[1:]))
"""


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
    few = ["--batch-size", "1", "--out", tmp_path / "few"]
    codes, said = launch(2, "-c", STREAMED, "select", *given, *few)
    assert codes == [2, 2] and "rank 1 has no row: rows in batches of 1" in said[0][1]


BAD = {
    "no file": (["select", "--train-file", "/no/such.csv"], "/no/such.csv"),
    "a verb of one": (["merge"], "beft-ext merge is for one process, and 2 were started"),
    "no row": (["select", "--batch-size", "1"], "rank 1 has no row: 21 in batches of 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_on_rank_0_and_exit_code_2_on_all(launch, given, tmp_path, name):
    (verb, *arguments), sentence = BAD[name]
    own = given if verb == "select" else [*given[:2], "--adapter", tmp_path]
    codes, said = launch(2, "-m", "beft_ext", verb, *own, *arguments, "--out", tmp_path)
    assert codes == [2, 2], said
    own = [line for line in said[0][1].splitlines() if line.startswith("beft-ext: ")]
    assert len(own) == 1 and sentence in own[0]
    assert "beft-ext: " not in said[1][1]
