"""Memory that runs out in the middle of a command is one sentence, with what to lower."""

from argparse import Namespace

import pytest
import torch
from test_words import write
from transformers import BertForSequenceClassification

from beft_ext.commands.cli import main
from beft_ext.commands.loading import WorkflowError
from beft_ext.commands.shortage import enough_memory
from beft_ext.parallel import RankError, is_told, known
from beft_ext.training.steps import EagerStep


def of_host(*_):
    torch.empty(2**55, dtype=torch.uint8)  # in torch's own words


def of_gpu(*_):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1.00 GiB"
    )


both = pytest.mark.parametrize("shortage, place, amount", [
    (of_host, "host", "36028797018963968 bytes"), (of_gpu, "GPU", "20.00 MiB"),
])  # fmt: skip


@pytest.fixture
def command(tiny_folder, tmp_path):
    rows = write(tmp_path / "rows.csv", ["refund", "praise"] * 8)
    args = ["tune", "--model", tiny_folder, "--train-file", rows, "--validation-file", rows]
    args += ["--terms", "value", "--epochs", "2", "--batch-size", "4", "--save-every", "1"]
    return [*args, "--out", str(tmp_path / "out")]


@both
def test_a_step_that_runs_out_says_what_to_lower(
    command, monkeypatch, capsys, shortage, place, amount
):
    work, steps = EagerStep.work, []

    def some(self, batch):
        steps.append(batch)
        return shortage() if len(steps) == 3 else work(self, batch)

    monkeypatch.setattr(EagerStep, "work", some)
    assert main(command) == 2
    said = [n for n in capsys.readouterr().err.splitlines() if n.startswith("beft-ext: ")]
    assert len(said) == 1
    assert (
        f"the {place} is out of memory ({amount} were asked for): lower --batch-size (4) or "
        in (said[0])
    )
    assert said[0].endswith("--bf16") and "Error" not in said[0]
    monkeypatch.undo()
    assert main([*command, "--resume"]) == 0  # the checkpoint before it is whole


def test_pythons_own_shortage_and_a_verb_without_batches():
    told = pytest.raises(WorkflowError, match="the host is out of memory: take a smaller model")
    with told, enough_memory(Namespace(verb="merge")):
        raise MemoryError


@both
def test_a_shortage_that_was_made_into_another_error_is_told_too(
    command, monkeypatch, capsys, shortage, place, amount
):
    """A model's forward fails: the batch "cannot be read"."""
    forward, calls = BertForSequenceClassification.forward, []

    def some(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return shortage() if sum(calls) == 2 else forward(self, *args, **kwargs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", some)
    select = ["select", *command[1:5], "--method", "beft", "--out", command[-1]]
    assert main(select) == 2
    said = [n for n in capsys.readouterr().err.splitlines() if n.startswith("beft-ext: ")]
    assert len(said) == 1 and "cannot read" not in said[0]
    assert f"the {place} is out of memory ({amount} were asked for): lower --batch-size" in said[0]


def test_a_shortage_of_another_rank_is_told_with_its_number():
    def found(error):
        with pytest.raises(WorkflowError) as told, enough_memory(Namespace(batch_size=4)):
            raise error
        return str(told.value), is_told(told.value)

    heard = RankError("rank 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    said = "the GPU is out of memory (2.00 GiB were asked for): lower --batch-size (4)"
    assert found(known(heard)) == (f"rank 1: {said}", True)
    assert found(known(RankError("rank 2: MemoryError: MemoryError"))) == (
        "rank 2: the host is out of memory: lower --batch-size (4)", True
    )  # fmt: skip
    again = f"rank 1: {said}"
    assert found(known(WorkflowError(again))) == (again, True)  # that rank knew what to lower


def test_what_is_no_shortage_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"^another$"), enough_memory(Namespace()):
        raise RuntimeError("another")
