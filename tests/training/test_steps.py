"""Steps as CUDA graphs. Without a GPU a stand-in for the capture runs the step again at each
replay, on the same fixed buffers: shapes, padding, rates and buffers are tested, not CUDA."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import batch, tiny

from beft_ext import BiasAdamW, prepare
from beft_ext.ops import dispatch
from beft_ext.training.loss import model_loss
from beft_ext.training.steps import (
    LENGTH_MULTIPLE,
    EagerStep,
    GraphedStep,
    StepError,
    _CudaCapture,
)
from beft_ext.training.tuning import Recipe, TuningError, tune


def again(work):
    """Runs ``work`` anew. A graph writes its gradients anew at each replay, so it does too."""

    def replay():
        again.step.optimizer.zero_grad()
        work()

    return replay


def made(kind, device="cpu", **options):
    model = tiny("bert").to(device)
    prepare(model, "value")
    model.train()
    again.step = kind(model, BiasAdamW(model, lr=1.0, max_grad_norm=1.0), **options)
    return again.step


def losses(step, batches, device="cpu"):
    torch.manual_seed(0)
    rates = (1e-2 / (1 + i) for i in range(len(batches)))
    found = []
    for one, rate in zip(batches, rates, strict=True):
        loss, norm = step({k: v.to(device) for k, v in one.items()}, rate)
        found.append((float(loss), float(norm)))
    return found


def mixed():
    """Three lengths within two buckets, and a short last batch."""
    shapes = [(4, 9), (4, 40), (4, 20), (4, 9), (4, 33), (4, 20), (2, 9)]
    return [batch(rows, tokens, seed=i) for i, (rows, tokens) in enumerate(shapes)]


def test_graphed_steps_are_the_eager_ones():
    eager, graphed = made(EagerStep), made(GraphedStep, capture=again)
    batches = mixed()
    found = losses(graphed, batches)
    assert found == losses(eager, [graphed.padded(b) for b in batches])
    assert len(graphed.graphs) == 2 and len(graphed.seen) == 3
    for a, b in zip(graphed.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [EagerStep, lambda *made: GraphedStep(*made, capture=again)])
def test_a_step_is_torchs(kind):
    step, model, batches = made(kind), tiny("bert"), [batch(4, 32, seed=i) for i in range(4)]
    prepare(model, "value")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    found, want = losses(step, batches), []
    model.train()
    torch.manual_seed(0)
    for i, one in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + i)
        optimizer.zero_grad()
        loss = model(**one).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        want.append((float(loss.detach()), float(norm)))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(want), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [EagerStep, lambda *a, **o: GraphedStep(*a, capture=again, **o)])
def test_the_forward_alone_runs_in_bf16_and_only_if_asked(kind, bf16):
    seen = []

    def loss(model, batch):
        logits = model(**batch).logits
        seen.append(logits.dtype)
        assert not torch.is_autocast_cache_enabled()  # a replay would read what was cast before it
        logits.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        return logits.float().square().mean(1)  # of each example: their mean is minimised

    step = made(kind, loss=loss, bf16=bf16)
    value, _ = step(batch(), 1e-2)
    assert seen == [torch.bfloat16 if bf16 else torch.float32, False]
    assert value.ndim == 0 and not value.requires_grad


def test_padding_changes_no_loss():
    graphed, eager = made(GraphedStep, capture=again), made(EagerStep)
    for step in (graphed, eager):
        step.model.eval()
    short = batch(4, 9)
    assert graphed.padded(short)["input_ids"].shape == (4, LENGTH_MULTIPLE)
    found, plain = losses(graphed, [short]), losses(eager, [short])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_padded_is_left_as_it_is():
    step = made(GraphedStep, capture=again)
    assert step.padded({"input_ids": torch.ones(2, 5)})["input_ids"].shape == (2, 5)
    strange = batch(2, 5) | {"spans": torch.ones(2, 5)}
    assert step.padded(strange)["input_ids"].shape == (2, 5)
    tokens = batch(2, 5) | {"labels": torch.ones(2, 5, dtype=torch.long)}
    assert step.padded(tokens)["labels"][:, 5:].eq(-100).all()


def test_every_text_is_filled_up_with_what_counts_for_nothing():
    step = made(GraphedStep, capture=again, pad=7)
    ones = torch.ones(4, 2, 9, dtype=torch.long)
    names = ("input_ids", "attention_mask", "token_type_ids")
    given = dict.fromkeys(names, ones) | {"labels": torch.arange(4)}
    padded = step.padded(given)
    assert torch.equal(padded["labels"], given["labels"])
    for name, fill in zip(names, (7, 0, 0), strict=True):
        assert padded[name].shape == (4, 2, 32)
        assert padded[name][..., :9].eq(1).all() and padded[name][..., 9:].eq(fill).all()
    for tokens, length in ((1, 32), (31, 32), (32, 32), (33, 64), (64, 64)):
        assert step.padded(batch(2, tokens))["input_ids"].shape == (2, length)
    assert step.padded({"input_ids": ones, "labels": ones})["input_ids"] is ones


def test_inputs_that_differ_in_dtype_or_name_alone_have_graphs_of_their_own():
    def loss(model, given):
        given = {k: v.long() if k == "attention_mask" else v for k, v in given.items()}
        return model_loss(model, given)

    step = made(GraphedStep, capture=again, loss=loss)
    one = batch(2, 32)
    types = one | {"token_type_ids": torch.zeros_like(one["input_ids"])}
    other = one | {"attention_mask": one["attention_mask"].bool()}
    losses(step, [one, other, types] * 2)
    assert len(step.graphs) == 3


def test_a_bounded_number_of_graphs(monkeypatch):
    monkeypatch.setattr("beft_ext.training.steps.MOST_GRAPHS", 1)
    step = made(GraphedStep, capture=again)
    losses(step, [batch(rows, 9) for rows in (2, 3, 2, 3, 3)])
    assert len(step.graphs) == 1


def test_without_a_gpu_it_says_so(tmp_path):
    model = tiny("bert")
    prepare(model, "value")
    with pytest.raises(StepError, match="CUDA device"):
        tune(model, [batch()], lambda _: 0.0, tmp_path, Recipe(graphs=True))
    with pytest.raises(TuningError, match="do not go together"):
        tune(model, [batch()], lambda _: 0.0, tmp_path, Recipe(graphs=True, compile=True))


def test_what_a_replay_gave_stays_when_the_graph_runs_again():
    """A graph writes into the same memory at each replay; a loss may be read only later."""
    step = made(GraphedStep, capture=lambda work: None)
    fixed = torch.zeros(()), torch.zeros(())

    def capture(work):
        work()

        def replay():
            for tensor in fixed:
                tensor.add_(1)

        return replay

    step.capture = capture
    same = batch()
    step(same, 1e-2)
    step(same, 1e-2)  # captured here
    (replay,) = step.graphs.values()
    replay.outputs = fixed
    for tensor in fixed:
        tensor.zero_()
    given = [step(same, 1e-2) for _ in range(3)]
    assert [(float(loss), float(norm)) for loss, norm in given] == [(1, 1), (2, 2), (3, 3)]


def test_a_step_that_cannot_be_captured_is_named():
    def refused(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step = made(GraphedStep, capture=refused)
    with pytest.raises(StepError, match=r"cannot be captured \(operation not permitted"):
        losses(step, [batch(), batch()])


class OnGpu:
    def parameters(self):
        yield type("Parameter", (), {"device": torch.device("cuda")})


@pytest.mark.parametrize(("backend", "refused"), [("triton", 0), ("reference", 1), ("cuda", 0)])
def test_graphs_need_kernels_that_ask_nothing_of_the_host(monkeypatch, backend, refused):
    monkeypatch.setattr(dispatch, "choose", lambda device: backend)
    try:
        GraphedStep(OnGpu(), None)
    except StepError as error:
        assert refused and "compiled CUDA kernels" in str(error)
    except Exception:  # torch, where there is no GPU
        assert not refused
    else:
        assert not refused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graphs_on_a_gpu_train_to_the_same_losses(request, backend, bf16):
    if dispatch.backends()[backend]:
        pytest.skip(dispatch.backends()[backend])
    request.addfinalizer(lambda: dispatch.set_backend(None))
    dispatch.set_backend(backend)
    graphed, eager = (made(kind, "cuda", bf16=bf16) for kind in (GraphedStep, EagerStep))
    batches = mixed()
    found = losses(graphed, batches, "cuda")
    plain = losses(eager, [graphed.padded(b) for b in batches], "cuda")
    assert found == pytest.approx(plain, rel=1e-6) and graphed.graphs


def test_captures_leave_other_threads_alone_and_warm_up_on_one_stream(monkeypatch):
    """On fakes of what torch has for a GPU."""
    asked, streams = [], []

    class Stream:
        def __init__(self, device):
            streams.append(self)

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 5)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **kw: asked.append(kw) or nullcontext())
    assert _CudaCapture()(lambda: None) == "replay"
    assert asked == [{"pool": 5, "capture_error_mode": "thread_local"}]

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    step = made(GraphedStep, capture=again)
    step.device = torch.device("cuda")
    for _ in range(3):
        step.warm_up(batch())
    assert len(streams) == 1 + 3  # the warm-ups' own, and those that it waits for
