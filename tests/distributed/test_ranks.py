"""Several processes are one: ranks find together what one process finds in all of their rows."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from beft_ext import prepare
from beft_ext.training.optim import BiasAdamW
from beft_ext.training.steps import EagerStep

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("what_ranks_do", HERE / "ranks.py")
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch has no gloo",
)


@pytest.fixture(scope="module")
def jobs(launch, tmp_path_factory):
    """What every rank found, by the number of ranks."""
    known = {}

    def of(size):
        if size not in known:
            out = tmp_path_factory.mktemp(f"ranks-{size}")
            known[size] = out, *launch(size, HERE / "ranks.py", out, size)
        out, codes, said = known[size]
        assert codes == [0] * size, "\n".join(err[-3000:] for _, err in said)
        found = [torch.load(out / f"{size}-{r}.pt", weights_only=False) for r in range(size)]
        found[0]["folder"] = out
        return found

    return of


def same(a, b):
    """To the bit, NaN too."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b or repr(a) == repr(b)


def close(a, b, tolerance=1e-5):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key], tolerance)
    else:
        torch.testing.assert_close(
            torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.fixture(params=[2, 3])
def size(request):
    return request.param


@pytest.mark.parametrize("name", ranks.MODELS)
def test_all_ranks_select_what_one_process_selects(jobs, size, name):
    own = jobs(size)
    one = ranks.selection_of(ranks.model_of(name), ranks.batches_of_all(name, size))
    for found in own[1:]:
        same(found[name], own[0][name])
    found = own[0][name]
    assert found["examples"] == one["examples"] and found["dead"] == one["dead"]
    assert found["ranking"]["gain"][0] == one["ranking"]["gain"][0]
    # A ridge may be 1e-4 of an eigenvalue: with few examples K's rounding shows 1e4 times as large.
    wide = name == "encoder in fp64"
    for figure in ("values", "errors", "chance", "bands", "curve"):
        close(found["gains"][figure], one["gains"][figure], 1e-5 if wide else 5e-3)
    close({k: v for k, v in found["grams"].items() if k != "groups"},
          {k: v for k, v in one["grams"].items() if k != "groups"})  # fmt: skip
    assert torch.equal(found["grams"]["groups"], one["grams"]["groups"])
    if wide:
        assert [e[:2] for e in found["frontier"]] == [e[:2] for e in one["frontier"]]
    # AdamW divides noise by its own size: the run is held to less than the gradients are.
    close(found["losses"], one["losses"], 1e-4)
    for method in ("example_fisher", "fisher"):
        close(found["scores"][method], one["scores"][method], 1e-3)


@pytest.mark.parametrize("name", ranks.MODELS)
def test_the_first_step_is_that_of_one_process(jobs, size, name):
    model, batches = ranks.model_of(name), ranks.batches_of_all(name, size)
    prepare(model, "value")
    step = EagerStep(model.train(), BiasAdamW(model, lr=0.0))
    loss, _ = step(batches[0], 0.0)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for found in jobs(size):
        told = found[f"{name}, first step"]
        close(told["loss"], float(loss))
        largest = max(float(g.abs().max()) for g in grads.values())
        close({n: g / largest for n, g in told["grads"].items()},
              {n: g / largest for n, g in grads.items()})  # fmt: skip


def test_a_model_in_ddp_is_the_model_inside(jobs, size):
    for found in jobs(size):
        same(found["wrapped"], found["encoder"])


def test_all_ranks_end_with_the_parameters_of_one_process(jobs, size, tmp_path):
    own = jobs(size)
    one = ranks.tuned(ranks.prepared(), ranks.batches_of_all("encoder", size), tmp_path)
    for found in own[1:]:
        same(found["tuned"], own[0]["tuned"])
    close(own[0]["tuned"]["trained"], one["trained"], 1e-4)
    close([h["loss"] for h in own[0]["tuned"]["history"]], [h["loss"] for h in one["history"]])
    log = own[0]["folder"] / f"tuned-{size}" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 2


def test_ddp_and_a_run_that_was_broken_off_end_in_the_same_bits(jobs):
    for found in jobs(2):
        same(found["tuned, wrapped"], found["tuned"])
        assert "Stopped" in found["resumed"].pop("said")
        same(found["resumed"], found["tuned"])


REFUSED = {
    "wrapped first": r"^PrepareError: .* added to '.*: prepare the model first",
    "drift": r"^OptimizerError: ranks 0 and 1 have different gradients of '.*v_proj.bias'",
    "another model": r"^SelectionError: rank 1 and rank 0 differ in the model",
    "another rate": r"^SelectionError: rank 1 and rank 0 differ in arguments",
    "an empty rank": r"^SelectionError: (rank 1: )?the loader is empty",
    "a row": r"^GainError: (rank 1: )?the loss of example 5 is not finite",
    "the same rows": r"^SelectionError: ranks 0 and 1 read the same batch",
    "graphs": r"^TuningError: graphs are of one process",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused_on_every_rank(jobs, fault):
    for found in jobs(2):
        assert re.search(REFUSED[fault], found["refused"][fault])


def test_one_rank_alone_says_so(jobs):
    found = jobs(2)[0]
    assert len(found["alone"]) == 1 and "only rank 0 of 2 came to select" in found["alone"][0]
    assert found["within alone"] == []


def test_a_rank_that_ends_is_named(jobs):
    for found in jobs(3)[:2]:
        assert found["lost"].startswith("RankError: rank 2 ended, or did not answer within 100 s")
