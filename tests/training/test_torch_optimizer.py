"""BiasAdamW is a torch optimizer: torch's own scenarios, compared with torch.optim.AdamW; and
whatever happens to parameters, gradients and state around it is right, or one sentence.
"""

import copy
import io
import pickle

import pytest
import torch
from conftest import batch, tiny
from torch import nn

from beft_ext import prepare
from beft_ext.errors import BeftError
from beft_ext.training.optim import BiasAdamW, OptimizerError

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
EPS = torch.finfo(torch.float32).eps


def parameter(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def gradient(shape, step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(shape, generator=generator)


def give(p, grad):
    """Make ``grad`` the gradient, of whatever dtype it is."""
    p.grad = None
    p.grad_dtype = None
    p.grad = grad


def double(p):
    return p.detach().double().contiguous().requires_grad_()


def follow(p, form=lambda g: g, steps=4, **options):
    """Steps ``p`` with gradients in a form of their own; it must move as AdamW does in fp64."""
    optimizer = BiasAdamW([p], lr=1e-2, **options)
    twin = double(p)
    other = torch.optim.AdamW([twin], lr=1e-2, **{"weight_decay": 0.0, **options})
    for step in range(steps):
        give(p, form(gradient(p.shape, step)))
        twin.grad = p.grad.double()
        optimizer.step()
        other.step()
    same(optimizer, p, twin, steps)


def same(optimizer, p, twin, steps):
    value = optimizer.state[p].get("master", p).detach().double()
    assert value.shape == twin.shape
    if value.numel():
        assert (value - twin).abs().max() <= steps * EPS * (twin.abs().max() + 8e-2)
    assert torch.equal(p.detach(), value.to(p.dtype))
    assert torch.isfinite(optimizer.grad_norm)


# The inputs of torch's own tests of AdamW (torch.testing._internal.common_optimizers).
INPUTS = [
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"amsgrad": False, "foreach": True},
    {"fused": True, "differentiable": False},
    {"foreach": False, "capturable": True},
    {"lr": torch.tensor(0.001), "capturable": True},
    {"lr": torch.tensor([0.01]), "betas": (torch.tensor(0.9), torch.tensor([[0.99]]))},
    {"lr": 0.0},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", INPUTS, ids=str)
def test_inputs_of_torchs_own_tests(options, dtype):
    plain = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    plain["betas"] = tuple(map(float, options.get("betas", (0.9, 0.999))))
    plain = {k: v for k, v in plain.items() if k not in ("foreach", "fused", "capturable")}
    p = parameter(5, 3, dtype=dtype)
    twin = double(p)
    optimizer = BiasAdamW([p], **options)
    other = torch.optim.AdamW([twin], **{"weight_decay": 0.0, **plain})
    for step in range(6):
        p.grad = gradient(p.shape, step).to(dtype)
        twin.grad = p.grad.double()
        optimizer.step()
        other.step()
    same(optimizer, p, twin, 6)
    assert optimizer.state[p]["step"] == other.state[twin]["step"]


def test_zero_and_missing_gradients_change_nothing_but_the_count():
    p = parameter(4)
    before = p.detach().clone()
    optimizer = BiasAdamW([p], lr=0.1)
    optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 0
    p.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1


def test_a_schedule_that_starts_at_zero():
    p, q = parameter(6), parameter(6)
    for tensor, kind in ((p, BiasAdamW), (q, torch.optim.AdamW)):
        optimizer = kind([tensor], lr=0.1, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5)
        for step in range(5):
            tensor.grad = gradient(tensor.shape, step)
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda both: pickle.loads(pickle.dumps(both)),
        lambda both: saved_and_loaded(both),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_steps_like_the_original(copied, dtype):
    model = tiny("bert").to(dtype)
    prepare(model, "value")
    optimizer = BiasAdamW(model, lr=1e-2, max_grad_norm=0.5)
    move(model, optimizer, 0)
    twin, other = copied((model, optimizer))
    assert other.scores() == optimizer.scores() and other.grad_norm == optimizer.grad_norm
    assert {k for k in vars(other) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    for step in (1, 2):
        move(model, optimizer, step)
        move(twin, other, step)
    assert other.scores() == optimizer.scores() and other.grad_norm == optimizer.grad_norm
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def saved_and_loaded(things, **options):
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


def move(model, optimizer, step):
    optimizer.zero_grad()
    model(**batch(seed=step)).loss.backward()
    optimizer.step()


def test_hooks_are_called():
    p = parameter(3)
    optimizer, log = BiasAdamW([p]), []
    optimizer.register_step_pre_hook(lambda *_: log.append("before the step"))
    optimizer.register_step_post_hook(lambda *_: log.append("after the step"))
    optimizer.register_state_dict_pre_hook(lambda *_: log.append("before the state"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {**state, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda *_: log.append("loaded"))
    p.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert log == ["before the step", "after the step", "before the state", "loaded"]
    assert optimizer.state[p]["step"] == 0  # the hook emptied the state


@pytest.mark.parametrize("step", [torch.ones(1), torch.tensor([[1]]), 1, 1.0, torch.tensor(1)])
def test_a_step_count_of_any_make(step):
    p, q = parameter(3), parameter(3)
    first, other = torch.optim.AdamW([q], weight_decay=0.0), BiasAdamW([p])
    q.grad = p.grad = torch.ones(3)
    first.step()
    state = copy.deepcopy(first.state_dict())
    state["state"][0]["step"] = step
    other.load_state_dict(state)
    p.data.copy_(q.detach())
    for optimizer in (first, other):
        optimizer.step()
    torch.testing.assert_close(p, q)
    assert other.state[p]["step"] == 2


@pytest.mark.parametrize("step", [float("nan"), -1, 1.5, "two", None, torch.ones(2)])
def test_a_step_count_that_is_none_changes_nothing(step):
    refused(lambda state: state["state"][0].update(step=step), "step")


def refused(spoil, message):
    p = parameter(3)
    optimizer = BiasAdamW([p], lr=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    state["param_groups"][0]["lr"] = 0.25
    state["state"][0]["exp_avg"] += 1
    spoil(state)
    with pytest.raises(OptimizerError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, value in before["state"][0].items():
        assert torch.equal(after["state"][0][key], value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["state"][0].update(exp_avg_sq=-torch.ones(3)), "below zero"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3).int()), "not finite"),
        (lambda s: s["state"][0].update(initial=torch.ones(4)), "another model"),
        (lambda s: s["state"][0].update(momentum_buffer=torch.ones(3)), "momentum_buffer"),
        (lambda s: s["state"][0].pop("exp_avg"), "lacks 'exp_avg'"),
        (lambda s: s["param_groups"][0].pop("betas"), "lack 'betas'"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (
            lambda s: s["param_groups"][0].update(decoupled_weight_decay=False, weight_decay=0.1),
            "Adam's",
        ),
        (lambda s: s.update(state={0: "text"}), "dictionary"),
        (lambda s: s.update(param_groups=3), "no optimizer's state"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil, message):
    refused(spoil, message)


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adamax", "NAdam", "Adagrad", "Adadelta"])
def test_states_of_other_optimizers_are_refused(name):
    p = parameter(3)
    other = getattr(torch.optim, name)([p], lr=1e-3)
    p.grad = torch.ones(3)
    other.step()
    with pytest.raises(OptimizerError, match="another optimizer's state"):
        BiasAdamW([p]).load_state_dict(other.state_dict())


def test_rates_are_not_shared_after_loading():
    p = parameter(3)
    optimizer, other = BiasAdamW([p], lr=torch.tensor(0.1)), BiasAdamW([p])
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"].fill_(9.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_saved_state_is_of_tensors_and_numbers_only():
    p = parameter(3, dtype=torch.bfloat16)
    optimizer = BiasAdamW([("x", p)], lr=torch.tensor(0.1))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    "group",
    [
        {"params": [torch.ones(3).int()]},
        {"params": [parameter(2)], "lr": -1.0},
        {"params": [parameter(2)], "betas": 3},
        {"params": [parameter(2)], "amsgrad": True},
        {"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]},
        {"params": [nn.Parameter(torch.ones(2, device="meta"))]},
        {"params": [nn.Parameter(torch.ones(1).expand(4))]},
        {"params": [3]},
    ],
    ids=str,
)
def test_a_refused_group_leaves_nothing_behind(group):
    p = parameter(3)
    optimizer = BiasAdamW([p])
    with pytest.raises((OptimizerError, TypeError)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == len(optimizer.state) == len(optimizer.scores()) == 1
    p.grad = torch.ones(3)
    optimizer.step()


def test_a_new_group_keeps_the_others_state():
    p, q = parameter(3), parameter(2, seed=1)
    twins = double(p), double(q)
    optimizer, other = BiasAdamW([p], lr=0.1), torch.optim.AdamW([twins[0]], lr=0.1, weight_decay=0)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [q], "lr": 0.5, "maximize": True})
            other.add_param_group({"params": [twins[1]], "lr": 0.5, "maximize": True})
        for a, b in zip((p, q), twins, strict=True):
            a.grad = gradient(a.shape, step)
            b.grad = a.grad.double()
        optimizer.step()
        other.step()
    torch.testing.assert_close(p.double(), twins[0], rtol=0, atol=4 * EPS * 2)
    torch.testing.assert_close(q.double(), twins[1], rtol=0, atol=4 * EPS * 2)


def test_a_parameter_given_twice_is_refused():
    p = parameter(3)
    with pytest.raises(OptimizerError, match="twice"), pytest.warns(UserWarning):
        BiasAdamW([p, p])


def test_an_emptied_state_begins_anew():
    p = parameter(3)
    optimizer = BiasAdamW([p])
    p.grad = torch.ones(3)
    for _ in range(2):
        optimizer.state.clear()
        optimizer.step()
        assert optimizer.state[p]["step"] == 1


CHANGES = {
    "bfloat16": lambda t: t.bfloat16(),
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "longer": lambda t: torch.randn(3 * t.numel()),
    "shorter": lambda t: t[:3],
    "empty": lambda t: t[:0],
    "strided": lambda t: torch.randn(2 * t.numel())[::2],
    "reshaped": lambda t: t.view(2, -1),
    "transposed": lambda t: torch.randn(7, 5).t(),
    "negative": lambda t: torch._neg_view(t.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_changed_before_the_first_step_is_laid_out_anew(change):
    p = parameter(3000 if change == "bfloat16" else 10)
    optimizer = BiasAdamW([p], lr=1e-2)
    p.data = CHANGES[change](p.data)
    twin = double(p)
    other = torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        p.grad = gradient(p.shape, step).to(p.dtype)
        twin.grad = p.grad.double()
        optimizer.step()
        other.step()
    same(optimizer, p, twin, 3)
    if change in ("bfloat16", "half", "double", "longer", "shorter"):
        (score,) = optimizer.scores().values()
        assert 0 < score.magnitude < 0.1  # against the value as it was laid out anew


@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_changed_after_a_step_is_one_sentence(change):
    p = parameter(10)
    optimizer = BiasAdamW([("bias", p)])
    p.grad = torch.ones(10)
    optimizer.step()
    optimizer.zero_grad()
    p.data = CHANGES[change](p.data)
    before = p.detach().clone()
    with pytest.raises(OptimizerError, match="'bias' changed after the optimizer's first step"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_a_change_is_told_with_before_and_after():
    p = parameter(2, 3)
    optimizer = BiasAdamW([("bias", p)])
    p.grad = torch.ones(2, 3)
    optimizer.step()
    optimizer.zero_grad()
    p.data = torch._neg_view(torch.ones(3, 2).half().t())
    before = r"from torch\.float32 \(2, 3\) on cpu, strides \(3, 1\) "
    after = r"to torch\.float16 \(2, 3\) on cpu, strides \(1, 2\), the negative of its memory: "
    with pytest.raises(OptimizerError, match=before + after):
        optimizer.step()


def test_a_gradient_of_the_size_before_is_one_sentence():
    p = parameter(10)
    optimizer = BiasAdamW([("bias", p)])
    p.grad = torch.ones(10)
    p.data = p.data[:4]
    with pytest.raises(OptimizerError, match=r"gradient of parameter 'bias' .*\(10,\)"):
        optimizer.step()


GRADIENTS = {
    "fp32": lambda g: g,
    "fp64": lambda g: g.double(),
    "bf16": lambda g: g.bfloat16(),
    "fp16": lambda g: g.half(),
    "negative": lambda g: torch._neg_view(g),
    "strided": lambda g: g.repeat_interleave(2)[::2],
    "expanded": lambda g: g.flatten()[:1].expand(g.shape),
    "conjugate": lambda g: torch.complex(g, g).conj().imag,
    "parameter": lambda g: nn.Parameter(g),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", GRADIENTS)
def test_gradients_of_any_form(form, dtype):
    follow(parameter(10, dtype=dtype), GRADIENTS[form])


@pytest.mark.parametrize("form", GRADIENTS)
def test_a_missing_gradient_says_nothing_of_the_next(form):
    (missing, p), alone = (parameter(3), parameter(10)), parameter(10)
    for tensors in ([missing, p], [alone]):
        optimizer = BiasAdamW(tensors, lr=1e-2)
        give(tensors[-1], GRADIENTS[form](gradient((10,), 0)))
        optimizer.step()
    assert torch.equal(p, alone) and torch.equal(missing, parameter(3))


def test_a_gradient_too_large_for_its_parameters_dtype():
    follow(parameter(10, dtype=torch.float16), lambda g: 1e6 * g)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.ones(4).to_sparse(), "sparse"),
        (torch.ones(4).int(), "int32"),
        (torch.ones(4).to(torch.complex64), "complex64"),
    ],
    ids=["sparse", "integer", "complex"],
)
def test_gradients_that_cannot_be_stepped(grad, message):
    p, q = parameter(4), parameter(4)
    optimizer, before = BiasAdamW([q, p]), q.detach().clone()
    q.grad = torch.ones(4)
    give(p, grad)
    with pytest.raises(OptimizerError, match=message):
        optimizer.step()
    assert torch.equal(q, before)


LAYOUTS = {
    "transposed": lambda: torch.randn(5, 7).t(),
    "every_other": lambda: torch.randn(20)[::2],
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "rows": lambda: torch.randn(6, 10)[:, 2:5],
    "every_other_column": lambda: torch.randn(6, 10)[:, ::2],
    "inner": lambda: torch.randn(4, 5, 6)[:, :, 1:3],
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0),
    "negative": lambda: torch._neg_view(torch.randn(7)),
}


@pytest.mark.parametrize("form", ["fp32", "fp64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_any_layout(layout, dtype, form):
    torch.manual_seed(0)
    follow(nn.Parameter(LAYOUTS[layout]().to(dtype)), GRADIENTS[form])


def test_what_lies_between_the_elements_is_not_touched():
    whole = torch.full((6, 10), 3.0)
    p = nn.Parameter(whole[:, 2:5])
    optimizer = BiasAdamW([p], lr=0.1)
    p.grad = torch.ones(6, 3)
    optimizer.step()
    assert (whole[:, :2] == 3).all() and (whole[:, 5:] == 3).all() and (whole[:, 2:5] < 3).all()


def test_rows_that_overlap_are_stepped_once():
    whole = torch.ones(8)
    p = nn.Parameter(whole.as_strided((3, 4), (2, 1)))
    optimizer = BiasAdamW([p], lr=0.5)
    p.grad = torch.ones(3, 4)
    optimizer.step()  # the first step is of the rate's length
    torch.testing.assert_close(whole, torch.full((8,), 0.5))


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_says_nothing_of_the_state(default_dtype):
    p = nn.Parameter(torch.linspace(-1, 1, 1500, dtype=torch.float32))
    b0 = p.detach().clone()
    optimizer = BiasAdamW([p], lr=1e-3, max_grad_norm=1.0)
    p.grad = torch.ones_like(p)
    for _ in range(300):  # bf16 counts to 256
        optimizer.step()
    assert optimizer.state[p]["step"] == 300
    (score,) = optimizer.scores().values()
    want = float((p.detach() - b0).abs().double().mean())
    assert score.magnitude == pytest.approx(want, rel=1e-5)
    assert float(optimizer.grad_norm) == pytest.approx(1500**0.5, rel=1e-6)


WRITES = {
    "data": lambda p, value: setattr(p, "data", value),
    "copy_": lambda p, value: p.data.copy_(value),
    "vector": lambda p, value: nn.utils.vector_to_parameters(value.clone(), [p]),
    "load": lambda p, value: nn.ParameterList([p]).load_state_dict({"0": value}),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_into_a_half_parameter_holds(write, dtype):
    p = parameter(40, dtype=dtype)
    optimizer = BiasAdamW([p], lr=1e-4)
    p.grad = torch.ones_like(p)
    optimizer.step()
    value = parameter(40, dtype=dtype, seed=5).detach()
    WRITES[write](p, value.clone())
    optimizer.step()
    moved = value.float() - optimizer.state[p]["master"]
    torch.testing.assert_close(moved, torch.full((40,), 1e-4), rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_same_value_written_again_keeps_the_master(dtype):
    ours, twins = (parameter(40, dtype=dtype) for _ in range(2))
    made = [(p, BiasAdamW([p], lr=1e-5)) for p in (ours, twins)]
    for step in range(30):
        for p, optimizer in made:
            p.grad = gradient(p.shape, step).to(dtype)
            optimizer.step()
        with torch.no_grad():
            ours.copy_(ours.clone())
        ours.data = ours.data.clone()
    masters = [optimizer.state[p]["master"] for p, optimizer in made]
    assert torch.equal(*masters) and not torch.equal(masters[0], ours.float())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_resumed_half_precision_run_is_the_same_to_the_bit(order, dtype):
    def begun():
        model = tiny("bert").to(dtype)
        prepare(model, "value")
        return model, BiasAdamW(model, lr=1e-4)

    model, optimizer = begun()
    for step in range(10):
        move(model, optimizer, step)
    saved = [copy.deepcopy(thing.state_dict()) for thing in (model, optimizer)]
    resumed = begun()
    pairs = list(zip(resumed, saved, strict=True))
    for thing, state in pairs if order == "model first" else reversed(pairs):
        thing.load_state_dict(state)
    for step in range(10, 20):
        move(model, optimizer, step)
        move(*resumed, step)
    assert all(map(torch.equal, model.parameters(), resumed[0].parameters()))
    for values, others in zip(optimizer.state.values(), resumed[1].state.values(), strict=True):
        assert all(torch.equal(values[key], others[key]) for key in values)


@pytest.mark.parametrize(
    ("factor", "beft"),
    [(1e-4, 0.9999), (1e-7, 1.0), (1e-20, 1.0), (1.0, 0.0), (-1.0, 2.0), (1e4, 0.9999)],
)
def test_scores_of_a_bias_of_another_length(factor, beft):
    p = parameter(1000)
    b0 = p.detach().clone()
    optimizer = BiasAdamW([p], lr=0.0)
    p.data.copy_(b0 * factor)
    p.grad = torch.ones(1000)
    optimizer.step()
    assert optimizer.scores()["0"].beft == pytest.approx(beft, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scores_without_a_vector_are_undefined(value):
    p = nn.Parameter(torch.full((10,), value))
    optimizer = BiasAdamW([p], lr=0.0)
    p.data.fill_(1 - value)
    p.grad = torch.ones(10)
    optimizer.step()
    assert optimizer.scores()["0"].beft != optimizer.scores()["0"].beft


def test_a_tensor_without_gradient_keeps_its_scores():
    p, q = parameter(10), parameter(2000, seed=1)
    optimizer = BiasAdamW([p, q], lr=0.1)
    p.grad, q.grad = torch.ones(10), torch.ones(2000)
    optimizer.step()
    held = optimizer.scores()
    q.grad = None
    optimizer.step()
    assert optimizer.scores()["1"] == held["1"] and optimizer.scores()["0"] != held["0"]


class OverDevices(BiasAdamW):
    """As if each parameter were on a device of its own."""

    def _entries(self):
        return [[entry] for entries in super()._entries() for entry in entries]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 1e3])
def test_several_devices_are_clipped_together(max_grad_norm, dtype):
    results = []
    for kind in (BiasAdamW, OverDevices):
        ps = [parameter(5, dtype=dtype), parameter(1500, dtype=dtype, seed=1), parameter(3)]
        optimizer = kind(ps, lr=1e-2, max_grad_norm=max_grad_norm)
        for step in range(3):
            for p in ps[: 2 if step == 1 else 3]:
                p.grad = (512 * gradient(p.shape, step)).to(p.dtype)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(512.0), torch.tensor(0.0)
            optimizer.step()
            norm = sum(float((p.grad.double() / 512).square().sum()) for p in ps) ** 0.5
            assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-5)
            for p, score in zip(ps, optimizer.scores().values(), strict=True):
                want = float((p.grad.double() / 512).norm())
                assert score.grad_norm == pytest.approx(want, rel=1e-5)
        assert len(optimizer._flats) == (1 if kind is BiasAdamW else 3)
        results.append(ps)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 1e-2, atol=1e-7)


def test_a_compiled_model_as_the_model_inside():
    model = tiny("bert")
    prepare(model, "value")
    names = BiasAdamW(model).scores().keys()
    assert BiasAdamW(torch.compile(model)).scores().keys() == names and "0.value" in names
    assert BiasAdamW(nn.DataParallel(model)).scores().keys() == names


class Replica(nn.parallel.DistributedDataParallel):
    """As a process of several holds it."""

    def __init__(self, model):
        nn.Module.__init__(self)
        self.module = model


def test_equal_replicas_are_stepped_and_a_model_that_lies_elsewhere_is_refused():
    model = tiny("bert")
    prepare(model, "value")
    assert BiasAdamW(Replica(model)).scores().keys() == BiasAdamW(model).scores().keys()
    model.bert.pooler.to("meta")  # as offloading does
    with pytest.raises(OptimizerError, match="in one process and on its devices"):
        BiasAdamW(model)


def test_every_element_of_an_interleaved_slice_moves():
    model = tiny("gpt-neox")
    (bias,) = prepare(model, "value", layers=[1]).biases
    p = model.get_parameter(bias.parameter)
    before, inside = p.detach().clone(), torch.zeros_like(p, dtype=torch.bool)
    bias.view(inside).fill_(True)
    p.grad = torch.ones_like(p)
    BiasAdamW(model, lr=0.5).step()
    assert bias.groups > 1 and torch.equal(p != before, inside)


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64), "is torch.complex64, torch.strided: "),
        (lambda: torch.eye(3).to_sparse(), "is torch.float32, torch.sparse_coo: "),
        (lambda: torch.ones(1).expand(4), "in several places"),
        (lambda: torch.ones(2, 1).expand(2, 3), "in several places"),
        (lambda: torch.ones(3).as_subclass(Own), "is a Own: "),
    ],
    ids=["complex", "sparse", "expanded", "expanded rows", "subclass"],
)
def test_what_cannot_be_stepped_is_named(value, message):
    with pytest.raises(OptimizerError, match=f"^parameter 'odd' .*{message}"):
        BiasAdamW([("fits", parameter(3)), ("odd", nn.Parameter(value()))])


def test_an_axis_of_one_may_have_any_stride():
    follow(nn.Parameter(torch.randn(3).as_strided((1, 3), (0, 1))))


def test_what_has_no_values_is_refused():
    with pytest.raises(OptimizerError, match="meta device"):
        BiasAdamW(nn.Linear(2, 2, device="meta"))
    with pytest.raises(OptimizerError, match="not initialized"):
        BiasAdamW(nn.LazyLinear(2).parameters())


def test_the_step_within_a_compiled_function():
    p, twin = parameter(4), parameter(4)
    optimizer, other = BiasAdamW([p], lr=0.1), BiasAdamW([twin], lr=0.1)
    p.grad = twin.grad = torch.ones(4)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(2):
        step()
        other.step()
    assert torch.equal(p, twin)


def test_errors_have_one_base():
    assert issubclass(OptimizerError, BeftError) and issubclass(OptimizerError, ValueError)
