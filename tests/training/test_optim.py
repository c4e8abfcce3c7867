"""BiasAdamW: torch's AdamW to rounding over a thousand steps, with every option; its scores."""

import copy

import pytest
import torch
from conftest import batch, tiny

from beft_ext.ops import backends, set_backend
from beft_ext.ops.bias_adamw_step import AdamWTables
from beft_ext.scores import beft_score, magnitude
from beft_ext.training.optim import BiasAdamW, OptimizerError, rate_factor

DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
USABLE = [name for name in DEVICES if not backends()[name]]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, params=USABLE)
def backend(request):
    set_backend(request.param)
    with torch.device(DEVICES[request.param]):
        yield request.param
    set_backend(None)


def params(seed=0, sizes=((7,), (1500,), (3, 33), (1,)), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, device="cpu") for s in sizes]
    return [t.to(torch.get_default_device(), dtype).requires_grad_() for t in made]


def give_grads(tensors, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for t in tensors:
        grad = torch.randn(t.shape, generator=generator, device="cpu") * (1 + step % 7)
        t.grad = grad.to(t.device, t.dtype)


def doubles(tensors):
    return [t.detach().double().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6},
        {"maximize": True},
        {"max_grad_norm": 1.0, "weight_decay": 0.01},
    ],
    ids=str,
)
def test_equals_adamw_over_a_thousand_steps(backend, options):
    steps = 1000 if backend == "cpu" else 100
    ours, theirs = params(), doubles(params())
    optimizer = BiasAdamW(ours, lr=1e-3, **options)
    plain = {"weight_decay": 0.0} | {k: v for k, v in options.items() if k != "max_grad_norm"}
    other = torch.optim.AdamW(theirs, lr=1e-3, **plain)
    for step in range(steps):
        give_grads(ours, step)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.double()
        if "max_grad_norm" in options:
            norm = torch.nn.utils.clip_grad_norm_(theirs, options["max_grad_norm"])
        optimizer.step()
        other.step()
        if "max_grad_norm" in options:
            torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=1e-5, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        # Each step rounds the value once more and moves it by at most about lr.
        bound = steps * EPS * (b.abs().max() + 1e-3 * 8)
        assert (a.double() - b).abs().max() <= bound


def test_scores_are_those_of_the_definitions():
    ours = params()
    before = [p.detach().clone().flatten() for p in ours]
    optimizer = BiasAdamW([(f"p{i}", p) for i, p in enumerate(ours)], lr=1e-2)
    for step in range(5):
        give_grads(ours, step)
        optimizer.step()
    for i, (p, b0) in enumerate(zip(ours, before, strict=True)):
        score, b = optimizer.scores()[f"p{i}"], p.detach().flatten()
        assert score.beft == pytest.approx(beft_score(b0, b), rel=1e-4, abs=1e-9)
        assert score.magnitude == pytest.approx(magnitude(b0, b), rel=1e-5)
        assert score.grad_norm == pytest.approx(float(p.grad.norm()), rel=1e-5)


def test_a_bias_without_a_gradient_keeps_its_scores():
    ours = params()
    optimizer = BiasAdamW([(f"p{i}", p) for i, p in enumerate(ours)], lr=1e-2)
    give_grads(ours, 0)
    optimizer.step()
    before = optimizer.scores()
    give_grads(ours, 1)
    ours[1].grad = None
    optimizer.step()
    same = {name for name, score in optimizer.scores().items() if score == before[name]}
    assert same == {"p1"}


def test_groups_schedulers_and_missing_gradients():
    ours, theirs = params(), params()
    made = []
    for kind, ps in ((BiasAdamW, ours), (torch.optim.AdamW, theirs)):
        groups = [{"params": ps[:2]}, {"params": ps[2:], "lr": 5e-2, "weight_decay": 0.3}]
        optimizer = kind(groups, lr=1e-2, weight_decay=0.0)
        made.append((optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 20)))
    for step in range(30):
        for ps, (optimizer, schedule) in zip((ours, theirs), made, strict=True):
            give_grads(ps, step)
            if step % 3 == 0:
                ps[1].grad = None
            optimizer.step()
            schedule.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_fp32_masters(dtype):
    half = params(dtype=dtype)
    full = [p.detach().float().requires_grad_() for p in half]
    optimizer, other = BiasAdamW(half, lr=1e-5), torch.optim.AdamW(full, lr=1e-5, weight_decay=0)
    for step in range(50):
        give_grads(half, step)
        for a, b in zip(half, full, strict=True):
            b.grad = a.grad.float()
        optimizer.step()
        other.step()
    for a, b in zip(half, full, strict=True):
        torch.testing.assert_close(optimizer.state[a]["master"], b.detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(a.detach(), optimizer.state[a]["master"].to(dtype))


def test_a_master_follows_a_parameter_written_from_outside():
    (p,) = params(sizes=((5,),), dtype=torch.bfloat16)
    optimizer = BiasAdamW([p], lr=1e-3)
    with torch.no_grad():
        p.fill_(4.0)
    give_grads([p], 0)
    optimizer.step()
    assert ((p.detach().float() - 4).abs() < 0.1).all()


def test_a_parameter_with_new_memory_is_stepped_there():
    (p,), (twin,) = params(sizes=((5,),)), params(sizes=((5,),))
    made = [(t, BiasAdamW([t], lr=1e-2)) for t in (p, twin)]
    held = p.data
    p.data = held.clone()
    before = held.clone()
    for t, optimizer in made:
        give_grads([t], 0)
        optimizer.step()
    assert torch.equal(p, twin) and torch.equal(held, before)


def test_gradients_of_any_layout_but_sparse_ones():
    ours, theirs = params(sizes=((3, 33),)), params(sizes=((3, 33),))
    give_grads(ours, 0)
    theirs[0].grad = ours[0].grad.t().contiguous().t()
    for tensors in (ours, theirs):
        BiasAdamW(tensors, lr=1e-2).step()
    assert not theirs[0].grad.is_contiguous() and torch.equal(ours[0], theirs[0])
    ours[0].grad = ours[0].grad.to_sparse()
    with pytest.raises(OptimizerError, match="sparse"):
        BiasAdamW(ours).step()


def test_grad_scaler_unscales_and_skips():
    ours, theirs = params(), params()
    optimizer = BiasAdamW(ours, lr=1e-2)
    other = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0)
    for step in range(6):
        scale = scaler.scale(torch.ones(()))
        give_grads(ours, step)
        give_grads(theirs, step)
        for p in ours:
            p.grad *= scale
        if step == 3:
            ours[0].grad[0] = float("inf")
            held = [p.detach().clone() for p in ours]
        else:
            other.step()
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert all(torch.equal(a, b) for a, b in zip(held, ours, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_state_moves_to_and_from_adamw():
    ours, theirs = params(), params()
    first = BiasAdamW(ours, lr=1e-2, weight_decay=0.1)
    second = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)

    def run(tensors, optimizer, begin, end):
        for step in range(begin, end):
            give_grads(tensors, step)
            optimizer.step()

    run(ours, first, 0, 5)
    run(theirs, second, 0, 5)
    states = [copy.deepcopy(o.state_dict()) for o in (first, second)]
    crossed = BiasAdamW(theirs, lr=1.0), torch.optim.AdamW(ours, lr=1.0)
    crossed[0].load_state_dict(states[1])
    crossed[1].load_state_dict(states[0])
    run(theirs, crossed[0], 5, 10)
    run(ours, crossed[1], 5, 10)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_resumed_run_is_the_same_to_the_bit():
    results = []
    for cut in (None, 4):
        ours = params()
        optimizer = BiasAdamW(ours, lr=1e-2, max_grad_norm=1.0)
        for step in range(8):
            if step == cut:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = BiasAdamW(ours, lr=1.0, max_grad_norm=1.0)
                optimizer.load_state_dict(saved)
            give_grads(ours, step)
            optimizer.step()
        results.append((ours, optimizer.scores()))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_trains_a_model_with_a_closure():
    device = torch.get_default_device()
    model, inputs = tiny("bert").to(device), {k: v.to(device) for k, v in batch().items()}
    optimizer = BiasAdamW([p for n, p in model.named_parameters() if "bias" in n], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_autograd_is_told_of_the_write():
    (p,) = params(sizes=((3,),))
    optimizer = BiasAdamW([p], lr=0.1)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": torch.ones(2)}, "learning rate must be one number"),
        ({"lr": None}, "learning rate must be one number"),
        ({"weight_decay": -0.5}, "weight_decay"),
        ({"betas": (0.9,)}, "betas"),
        ({"amsgrad": True}, "amsgrad"),
        ({"differentiable": True}, "differentiable"),
        ({"foreach": True, "fused": True}, "foreach and fused"),
        ({"lr": -1.0}, "learning rate"),
        ({"lr": float("nan")}, "learning rate"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(OptimizerError, match=message):
        BiasAdamW(params(), **options)


def test_a_rate_that_is_no_longer_a_number_stops_the_step():
    ours = params()
    optimizer, before = BiasAdamW(ours), [p.detach().clone() for p in ours]
    give_grads(ours, 0)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(OptimizerError, match="learning rate"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))


def test_a_state_of_another_model_changes_nothing():
    ours, others = params(), params(sizes=((8,), (1500,), (3, 33), (1,)))
    optimizer, other = BiasAdamW(ours), BiasAdamW(others)
    give_grads(others, 0)
    other.step()
    with pytest.raises(OptimizerError, match="another model"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state[ours[1]]["exp_avg"].any()
    with pytest.raises(OptimizerError, match="groups"):
        optimizer.load_state_dict(BiasAdamW(others[:2]).state_dict())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.clear(), "no optimizer's state"),
        (lambda state: state["param_groups"][0].update(lr=float("nan")), "learning rate"),
        (lambda state: state["state"][1].update(exp_avg=None), "another model"),
        (lambda state: state["state"][1]["exp_avg"].fill_(float("inf")), "not finite"),
    ],
)
def test_a_broken_state_changes_nothing(spoil, message):
    optimizer, other = BiasAdamW(params()), BiasAdamW(params())
    give_grads(other.param_groups[0]["params"], 0)
    other.step()
    state = copy.deepcopy(other.state_dict())
    spoil(state)
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_state_dict(state)
    assert not any(s["exp_avg"].any() for s in optimizer.state.values())
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_model_without_anything_to_train():
    with pytest.raises(OptimizerError, match="prepare"):
        BiasAdamW(tiny("bert").requires_grad_(False))


def test_opcheck():
    ours = params(sizes=((5,), (1030,)))
    optimizer = BiasAdamW(ours)
    (flat,) = optimizer._flats
    torch.library.opcheck(
        torch.ops.beft_ext.bias_adamw_step.default,
        tuple(tables(flat, optimizer, [torch.ones(5), None])),
    )


def tables(flat, optimizer, grads):
    return AdamWTables(
        [p.detach() for p in flat.params], grads, flat.state, flat.steps, flat.scores, flat.blocks,
        flat.first_blocks, flat.group_of, optimizer._settings()[0], None, 1.0, None, None,
        flat.workspace,
    )  # fmt: skip


def test_an_empty_state_is_loaded_whatever_the_default_device_is():
    bias = torch.nn.Parameter(torch.ones(3))
    optimizer = BiasAdamW([bias])
    bias.grad = torch.ones(3)
    optimizer.step()
    with torch.device("meta"):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": {}})
    assert not optimizer.state[bias]["exp_avg"].any() and optimizer.state[bias]["step"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_parameter_holds_wherever_its_master_does_not_round_to_it(dtype):
    """Each finite number, beside masters up to a step away, at and around the half."""
    step = 2**16 if dtype == torch.bfloat16 else 2**13
    distances = torch.tensor([0, step // 2 - 1, step // 2, step // 2 + 1, step], dtype=torch.int32)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = patterns[patterns.isfinite()]
    value = numbers.float().repeat(10)
    away = torch.cat([distances, -distances]).repeat_interleave(len(numbers))
    master = (value.view(torch.int32) + away).view(torch.float32)
    p = numbers.repeat(10).requires_grad_()
    optimizer = BiasAdamW([p], lr=0.0)
    optimizer.state[p]["master"].copy_(master)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = torch.where(master.to(dtype) == p.detach(), master, value)
    found = optimizer.state[p]["master"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(p.detach(), expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 33])
def test_the_rate_rises_and_falls_along_straight_lines(steps, warmup):
    peak = max(1, round(warmup * steps)) - 1
    rates = [rate_factor(i, steps, warmup, decay=True) for i in range(steps)]
    up = torch.linspace(0, 1, peak + 2, dtype=torch.float64)[1:]
    down = torch.linspace(1, 0, steps - peak + 1, dtype=torch.float64)[1:-1]
    assert rates == pytest.approx([*up.tolist(), *down.tolist()], abs=1e-12)
    rates = [rate_factor(i, steps, warmup, decay=False) for i in range(steps)]
    assert rates == pytest.approx([*up.tolist(), *[1.0] * (steps - 1 - peak)], abs=1e-12)
