"""Several processes are one: ranks find together what one process finds in all of their rows."""

import json
import re
from pathlib import Path

import pytest
import rank_data as data
import ranks
import torch
from safetensors import safe_open

from beft_ext import prepare
from beft_ext.training.optim import BiasAdamW
from beft_ext.training.steps import EagerStep
from beft_ext.training.tuning import CHECKPOINT

SCRIPT = Path(__file__).parent / "ranks.py"

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
            if size == 2:
                ranks.save_state(data.model_of("encoder"), out / "state-of-one")
            known[size] = out, *launch(size, SCRIPT, out, size, seconds=300)
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


@pytest.fixture(params=[2, 4])
def size(request):
    return request.param


@pytest.mark.parametrize(("size", "name"), data.CASES)
def test_all_ranks_select_what_one_process_selects(jobs, size, name):
    own = jobs(size)
    one = ranks.selection_of(data.model_of(name), data.batches_of_all(name, size))
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


@pytest.mark.parametrize(("size", "name"), data.CASES)
def test_the_first_step_is_that_of_one_process(jobs, size, name):
    model, batches = data.model_of(name), data.batches_of_all(name, size)
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


@pytest.mark.parametrize(("size", "name"), data.CASES)
def test_a_sharded_model_is_the_whole_one(jobs, size, name):
    """To the bit; one rank has single rows, and none in the end."""
    for found in jobs(size):
        same(found[f"{name}, sharded"], found[name])
        same(found[f"{name}, sharded, first step"], found[f"{name}, first step"])


def test_weights_of_a_sharded_model_get_no_gradient_in_vain(jobs):
    for found in jobs(2):
        assert found["in vain"] == {"self_attn.v_proj.bias"}


def test_a_loop_of_ones_own_over_a_sharded_model_takes_the_mean_of_the_ranks(jobs):
    first, second = (found["own loop"] for found in jobs(2))
    same(first, second)
    model = data.model_of("bias-free")
    prepare(model, "value")
    optimizer = BiasAdamW(model, lr=1e-2)
    for pair in zip(*(data.batches_of("bias-free", 2, r)[:3] for r in (0, 1)), strict=True):
        optimizer.zero_grad()
        (sum(model(**own).loss for own in pair) / 2).backward()
        optimizer.step()
    close(first, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, 1e-4)


@pytest.mark.parametrize("name", ["encoder", "bias-free", data.FOLDED])
def test_a_sharded_model_saves_loads_and_merges_as_the_whole_one(jobs, name):
    own = jobs(2)
    for found in own:
        kept = found[f"{name}, sharded, kept"]
        same(kept["loaded"], kept["trained"])
        close(kept["merged"], kept["loaded"])
        for what in ("trained", "loaded", "merged", "files"):
            same(kept[what], found[f"{name}, plain, kept"][what])
    state = own[0][f"{name}, sharded, kept"]["state"]
    same(state, own[0][f"{name}, plain, kept"]["state"])


def test_an_optimizers_state_goes_on_with_another_number_of_ranks(jobs):
    """From one to two and from two to one, as if nobody had broken off."""
    own = jobs(2)
    model = data.model_of("encoder")
    prepare(model, "value")
    optimizer = BiasAdamW(model, lr=1e-2)
    ranks.steps_by_hand(model, optimizer, [1, 2, 3])
    whole = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    one = ranks.load_state(data.model_of("encoder"), own[0]["folder"] / "state-of-two")
    for found in (one, *(two["state of one"] for two in own)):
        same(found["trained"], whole)
        assert found["scores"] == optimizer.scores() and found["lr"] == 1e-2


def test_all_ranks_end_with_the_parameters_of_one_process(jobs, size, tmp_path):
    own = jobs(size)
    one = ranks.tuned(data.prepared(), data.batches_of_all("encoder", size), tmp_path)
    for found in own[1:]:
        same(found["tuned"], own[0]["tuned"])
    close(own[0]["tuned"]["trained"], one["trained"], 1e-4)
    close([h["loss"] for h in own[0]["tuned"]["history"]], [h["loss"] for h in one["history"]])
    log = own[0]["folder"] / f"tuned-{size}" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 2


def test_ddp_and_shards_end_in_the_same_bits(jobs):
    for found in jobs(2):
        same(found["tuned, wrapped"], found["tuned"])
        same(found["tuned, sharded"], found["tuned"])
    # A run goes on sharded or whole: its checkpoint names the same model.
    whole, spread = (run_of(jobs(2)[0]["folder"] / name) for name in ("tuned-2", "sharded"))
    assert whole == spread


def test_a_stream_is_read_as_a_list_is(jobs, size):
    """Of four ranks one's stream ends early. A pass more begins where all have ended."""
    batches = data.batches_of_all("encoder", size)
    one = ranks.selection_of(data.model_of("encoder"), batches, steps=data.STEPS + 2)
    for found in jobs(size):
        for what in ("gains", "grams", "frontier", "examples", "dead"):
            same(found["streamed"][what], found["encoder"][what])
        same(found["streamed"]["losses"][: data.STEPS], found["encoder"]["losses"])
        same(found["streamed"], jobs(size)[0]["streamed"])
    close(jobs(size)[0]["streamed"]["losses"], one["losses"], 1e-4)


def test_a_run_over_streams_that_was_broken_off_ends_in_the_bits_of_a_list(jobs, size):
    for found in jobs(size):
        told = dict(found["resumed"])
        assert "Stopped" in told.pop("said")
        same(told, found["tuned"])


def test_batches_that_judge_are_those_of_all_ranks(jobs, size):
    one = ranks.judged(data.batches_of_all("encoder", size))
    for found in jobs(size):
        assert found["judged"] == jobs(size)[0]["judged"]
    close(jobs(size)[0]["judged"], one, 1e-4)


def run_of(folder):
    with safe_open(folder / CHECKPOINT, "np") as file:
        return json.loads(file.metadata()["run"])


META = r"(rank 1: )?parameter '.*' is on the meta device, and no offload holds its value"
REFUSED = {
    "no gloo": r"^RankError: several processes need torch's gloo backend, which is missing here$",
    "a row of a sharded model": r"^GainError: (rank 1: )?the loss of example 5 is not finite",
    "a sharded bias": r"^PrepareError: '.*bias' is sharded, .*beft_ext.models.unsharded\(model\)$",
    "a sharded bias, listened at": r"^TapError: '.*bias' is sharded, .*: shard with ignored_params",
    "a sharded parameter that trains": r"^OptimizerError: parameter '.*' is a DTensor: .*unsharded",
    "tensor parallelism": r"^SelectionError: parameter '.*query.*' is split by tensor parallelism",
    "wrapped first": r"^PrepareError: .* added to '.*: prepare the model first",
    "drift": r"^OptimizerError: ranks 0 and 1 have different gradients of '.*v_proj.bias'",
    "another model": r"^SelectionError: rank 1 and rank 0 differ in the model: start all ranks",
    "another model, trained": r"^TuningError: rank 1 and rank 0 differ in model: start all ranks",
    "a model without values": rf"^SelectionError: {META}",
    "a model without values, measured": rf"^SelectionError: {META}",
    "a model without values, trained": rf"^OptimizerError: {META}",
    "another rate": r"^SelectionError: rank 1 and rank 0 differ in arguments",
    "another rate, trained": r"^TuningError: rank 1 and rank 0 differ in lr",
    "other steps": r"^SelectionError: rank 1 and rank 0 differ in steps: start all ranks",
    "other steps, trained": r"^TuningError: rank 1 and rank 0 differ in steps: start all ranks",
    "no steps": r"^SelectionError: a loader without a length needs steps=\.\.\.",
    "no steps, trained": r"^TuningError: tune needs a loader with a length, or steps=\.\.\.",
    "graphs": r"^TuningError: graphs are of one process",
    "an empty rank": r"^SelectionError: (rank 1: )?the loader is empty",
    "an empty stream": r"^SelectionError: (rank 1: )?the loader is empty",
    "an empty rank, measured": r"^SelectionError: (rank 1: )?the loader is empty",
    "an empty rank, trained": r"^TuningError: (rank 1: )?the loader is empty: it needs a batch",
    "too few": r"^TuningError: the loader gave fewer batches in epoch 1 than steps= says \(5\)",
    "a row": r"^GainError: (rank 1: )?the loss of example 5 is not finite",
    "the same rows": r"^SelectionError: ranks 0 and 1 read the same batch",
    "the same rows, trained": r"^TuningError: ranks 0 and 1 read the same batch",
    "other racers' rows": r"^AuditionError: rank 1 and rank 0 differ in the rows: start all ranks",
    "a stream of racers' rows": r"^AuditionError: .* give beft_ext.tasks.Batches, which can be par",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused_on_every_rank(jobs, fault):
    for found in jobs(2):
        assert re.search(REFUSED[fault], found["refused"][fault])


def test_a_sharded_model_goes_on_after_an_error(jobs):
    for found in jobs(2):
        same(found["refused"]["and after it"], found["encoder"])


def test_one_rank_alone_says_so(jobs):
    found = jobs(2)[0]
    assert len(found["alone"]) == 1 and "only rank 0 of 2 came to select" in found["alone"][0]
    assert found["within alone"] == []


def test_a_rank_that_ends_is_named(jobs):
    for found in jobs(4)[:3]:
        assert found["lost"].startswith("RankError: rank 3 ended, or did not answer within 100 s")
