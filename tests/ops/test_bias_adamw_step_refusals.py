"""The registered operator, called by anyone: what does not fit is an OperatorError and nothing is
written; with the native module and without it, eager and compiled.
"""

import pytest
import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode

from beft_ext.ops import dispatch
from beft_ext.ops.bias_adamw_tables import AdamWTables
from beft_ext.ops.checks import OperatorError
from beft_ext.scores import beft_score
from beft_ext.training.optim import BiasAdamW

operator = torch.ops.beft_ext.bias_adamw_step
HUGE = 2**62


@pytest.fixture(params=["native", "no native module"])
def native(request, monkeypatch):
    if request.param == "native":
        dispatch.native or pytest.skip("the native module is not built")
    else:
        monkeypatch.setattr(dispatch, "native", None)
    return request.param


def made(dtype=torch.float32):
    """Tables of three tensors, 7, 2500 (three blocks) and 15 elements."""
    params = [torch.ones(s).to(dtype).requires_grad_() for s in ((7,), (2500,), (3, 5))]
    optimizer = BiasAdamW(params, lr=0.1)
    (flat,) = optimizer._flats
    return AdamWTables(
        [p.detach() for p in params], [torch.ones_like(p) for p in params], flat.state, flat.steps,
        flat.scores, flat.blocks, flat.first_blocks, flat.group_of, optimizer._settings()[0], None,
        0.0, None, None, flat.workspace,
    )  # fmt: skip


def entry(column, value):
    """The second tensor's last block, changed in one place."""

    def change(tables):
        blocks = tables.blocks.clone()
        blocks[3, column] = value
        return {"blocks": blocks}

    return change


def of_another_tensor(tables):
    """A segment's last block that fits everything but the segment's other blocks."""
    blocks = tables.blocks.clone()
    blocks[3] = torch.tensor([2, 1, 0, 0, 0, 5])
    return {"blocks": blocks}


def first(*numbers):
    return lambda _: {"first_blocks": torch.tensor(numbers)}


def one(name, change):
    """The first parameter or gradient in another form."""
    return lambda t: {name: [change(getattr(t, name)[0]), *getattr(t, name)[1:]]}


def another(name, change):
    return lambda tables: {name: change(getattr(tables, name))}


WRONG = {
    "tensor too high": entry(0, 3),
    "tensor below zero": entry(0, -1),
    "tensor of another segment": entry(0, 0),
    "two tensors in a segment": of_another_tensor,
    "segment too high": entry(1, 3),
    "segment of another": entry(1, 0),
    "segment below zero": entry(1, -1),
    **{
        f"{what} {value}": entry(column, value)
        for column, what in ((2, "at parameter"), (3, "at gradient"), (4, "at state"))
        for value in (-1, HUGE, -HUGE, 2**63 - 1)
    },
    "one past the parameter": entry(2, 2500 - 452 + 1),
    "one past the gradient": entry(3, 2500 - 452 + 1),
    "one past the state": entry(4, 2522 - 452 + 1),
    "no length": entry(5, 0),
    "length below zero": entry(5, -1),
    "length too large": entry(5, 1025),
    "first not zero": first(1, 1, 4, 5),
    "first descends": first(0, 4, 1, 5),
    "first ends early": first(0, 1, 4, 4),
    "first huge": first(0, HUGE, HUGE, 5),
    "first below zero": first(0, -HUGE, 4, 5),
    "first of no segment": lambda t: {"first_blocks": t.first_blocks[:0]},
    "first int32": another("first_blocks", lambda x: x.int()),
    "blocks int32": another("blocks", lambda x: x.int()),
    "blocks narrow": another("blocks", lambda x: x[:, :5]),
    "state bf16": another("state", lambda x: x.bfloat16()),
    "state of two rows": another("state", lambda x: x[:2].clone()),
    "state strided": another("state", lambda x: x.t().contiguous().t()),
    "state short": another("state", lambda x: x[:, :9].clone()),
    "steps int32": another("steps", lambda x: x.int()),
    "steps short": another("steps", lambda x: x[:2]),
    "scores fp64": another("scores", lambda x: x.double()),
    "scores short": another("scores", lambda x: x[:1]),
    "workspace short": another("workspace", lambda x: x[:3]),
    "group too high": lambda _: {"group_of": [0, 0, 1]},
    "group below zero": lambda _: {"group_of": [0, 0, -1]},
    "group missing": lambda _: {"group_of": [0, 0]},
    "groups of five numbers": another("groups", lambda x: x[:5]),
    "clipped to nothing known": lambda _: {"max_grad_norm": float("nan")},
    "rates fp64": lambda _: {"lr": torch.zeros(1, dtype=torch.float64)},
    "rates of two groups": lambda _: {"lr": torch.zeros(2)},
    "scale of two": lambda _: {"grad_scale": torch.ones(2)},
    "infinity int32": lambda _: {"found_inf": torch.zeros((), dtype=torch.int32)},
    "norm on another device": lambda _: {"global_norm": torch.ones((), device="meta")},
    "gradient short": one("grads", lambda g: g[:3]),
    "gradient fp64": one("grads", lambda g: g.double()),
    "gradient strided": one("grads", lambda g: g.repeat_interleave(2)[::2]),
    "gradient negative": one("grads", torch._neg_view),
    "gradient sparse": one("grads", lambda g: g.to_sparse()),
    "gradient elsewhere": one("grads", lambda g: g.to("meta")),
    "gradient missing": another("grads", lambda g: g[:2]),
    "parameter int32": one("params", lambda p: p.int()),
    "parameter negative": one("params", torch._neg_view),
    "parameter elsewhere": one("params", lambda p: p.to("meta")),
    "half without a master": lambda t: {
        "params": [p.half() for p in t.params],
        "grads": [g.half() for g in t.grads],
    },
}


def refused(tables, call):
    written = [tables.state, tables.steps, tables.scores]
    before = [t.clone() for t in written]
    with pytest.raises(OperatorError):
        call(*tables)
    assert all(map(torch.equal, before, written))


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what, native):
    tables = made()
    refused(tables._replace(**WRONG[what](tables)), operator)


@pytest.mark.parametrize("what", ["tensor too high", "one past the state", "gradient short"])
def test_what_does_not_fit_is_refused_when_compiled(what):
    tables = made()
    call = torch.compile(lambda *arguments: operator(*arguments), backend="aot_eager")
    refused(tables._replace(**WRONG[what](tables)), call)


def faked(tables):
    with FakeTensorMode() as mode:
        return operator(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, tuple(tables)))


@pytest.mark.parametrize(
    "what", ["state bf16", "steps short", "rates of two groups", "gradient short", "group missing"]
)
def test_a_fake_call_is_refused_as_well(what):
    tables = made()
    with pytest.raises(OperatorError):
        faked(tables._replace(**WRONG[what](tables)))
    norm = faked(tables)
    assert norm.shape == () and norm.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_fits_steps_as_the_optimizer_does(dtype, native):
    tables = made(dtype)
    versions = [t._version for t in (*tables.params, tables.state)]
    norm = operator(*tables)
    assert float(norm) == pytest.approx(2522**0.5, rel=1e-6)
    for p in tables.params:  # the first step of AdamW is of the rate's length
        assert torch.equal(p, torch.full(p.shape, 0.9, dtype=torch.float32).to(dtype))
    # Autograd is told of the write.
    assert all(
        t._version > v for t, v in zip((*tables.params, tables.state), versions, strict=True)
    )


def test_a_tensor_without_gradient_keeps_its_scores(native):
    p, q = (torch.ones(10).requires_grad_() for _ in range(2))
    optimizer = BiasAdamW([p, q], lr=0.1)
    p.grad, q.grad = torch.ones(10), torch.ones(10)
    optimizer.step()
    held, q.grad = optimizer.scores(), None
    optimizer.step()
    assert optimizer.scores()["1"] == held["1"] and optimizer.scores()["0"] != held["0"]


@pytest.mark.parametrize("length", [1e-6, 1e-3, 1.0, 1e3])
def test_the_score_knows_no_unit(length, native):
    b0 = length * torch.linspace(-1, 2, 50)
    p = b0.clone().requires_grad_()
    optimizer = BiasAdamW([p], lr=0.0)
    p.data.copy_(3 * b0 + length)
    p.grad = torch.ones(50)
    optimizer.step()
    want = beft_score(b0, p.detach())
    assert optimizer.scores()["0"].beft == pytest.approx(want, rel=1e-5)
