"""bias_example_grads: every backend usable here against float64, on any shape, dtype and stride."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from strides import permuted
from torch import Tensor
from torch._subclasses import FakeTensorMode

from beft_ext.ops import OperatorError, backends, bias_example_grads, bias_grad_stats, set_backend

DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
USABLE = [name for name in DEVICES if not backends()[name]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.beft_ext.bias_example_grads
UNIT = 2.0**-24  # of fp32


@pytest.fixture(autouse=True)
def _any_backend_again():
    yield
    set_backend(None)


def rows_of(dy, offsets=None, scale=1.0, dtype=torch.float32, gap=0):
    """What is written into the middle of a slab of NaN, and that nothing else is."""
    batch = len(dy) if offsets is None else len(offsets) - 1
    width = dy.shape[-1]
    slab = torch.full((batch + 2, width + 2 * gap), torch.nan, dtype=dtype, device=dy.device)
    out = slab[1 : batch + 1, gap : gap + width]
    bias_example_grads(dy, out, example_offsets=offsets, scale=scale)
    found = out.clone()
    out.fill_(torch.nan)
    assert slab.isnan().all()
    return found


def check(dy, bounds, offsets=None, scale=1.0, gap=0):
    """Each row against loops over float64; a plain fp32 sum of n terms errs by at most n units of
    the sum of absolute values, and scale and product round once each."""
    rows = dy.double().cpu().flatten(0, -2).numpy()
    found = rows_of(dy, offsets, scale, gap=gap)
    assert len(found) == len(bounds)
    for row, (a, b) in zip(found.cpu().double().numpy(), bounds, strict=True):
        want, size = scale * rows[a:b].sum(0), abs(scale) * np.abs(rows[a:b]).sum(0)
        assert (abs(row - want) <= (b - a + 2) * UNIT * size + 1e-37).all()
    # bf16 is the fp32 value rounded to nearest even, which torch's cast does too.
    assert torch.equal(rows_of(dy, offsets, scale, torch.bfloat16, gap), found.bfloat16())


@pytest.mark.parametrize("backend", USABLE)
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 7),
    tokens=st.integers(0, 300),
    width=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    order=st.permutations([0, 1, 2]),
    step=st.integers(1, 3),
    gap=st.integers(0, 3),
    scale=st.floats(-64, 64, width=32),
    seed=st.integers(0, 2**31),
)
def test_dense(backend, batch, tokens, width, dtype, order, step, gap, scale, seed):
    set_backend(backend)
    dy = permuted(batch, tokens, width, order, step, dtype, DEVICES[backend], seed)
    check(dy, [(i * tokens, (i + 1) * tokens) for i in range(batch)], None, scale, gap)


@pytest.mark.parametrize("backend", USABLE)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 280), max_size=6),
    margin=st.integers(0, 5),
    width=st.sampled_from([0, 1, 33, 128, 129]),
    dtype=st.sampled_from(DTYPES),
)
def test_packed(backend, lengths, margin, width, dtype):
    set_backend(backend)
    edges = [int(e) for e in np.cumsum([margin, *lengths])]
    dy = torch.randn(edges[-1] + margin, width).to(DEVICES[backend], dtype)
    offsets = torch.tensor(edges, device=dy.device)
    check(dy, list(itertools.pairwise(edges)), offsets, 1.5, margin)


@pytest.mark.parametrize("backend", USABLE)
def test_an_example_without_rows_is_zero(backend):
    set_backend(backend)
    dy = torch.randn(9, 5, device=DEVICES[backend])
    found = rows_of(dy, torch.tensor([0, 0, 4, 4, 9, 9], device=dy.device), gap=2)
    assert not found[[0, 2, 4]].any()
    assert found[[1, 3]].any(1).all()
    for dtype in (torch.float32, torch.bfloat16):
        assert not rows_of(dy.new_zeros(3, 0, 5), dtype=dtype).any()


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 0, 0), (1, 1, 1), (2**40, 4, 0)])
def test_shapes_of_nothing_and_of_one(backend, shape):
    set_backend(backend)
    dy = torch.ones(1, 1, 1, device=DEVICES[backend]).expand(1, 1, min(shape[2], 1)).expand(shape)
    out = torch.full((shape[0], shape[2]), torch.nan, device=dy.device)
    assert bias_example_grads(dy, out) is None
    assert (out == shape[1]).all()


@pytest.mark.parametrize("backend", USABLE)
def test_double_goes_to_the_reference(backend):
    set_backend(backend)
    dy = torch.randn(3, 7, 5, dtype=torch.float64, device=DEVICES[backend])
    torch.testing.assert_close(rows_of(dy, scale=0.3, dtype=torch.float64), 0.3 * dy.sum(1))


@pytest.mark.parametrize("backend", [b for b in USABLE if b != "reference"])
def test_millions_of_rows_err_by_rounding_alone(backend):
    set_backend(backend)
    dy = torch.rand(1, 4_000_000, 3).to(DEVICES[backend])
    want = dy.double().sum(1)
    # Each chunk of 128 rows is at most 3 + 16 additions deep; the chunks are compensated.
    assert ((rows_of(dy) - want).abs() / want).max() <= 20 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", [b for b in USABLE if b != "reference"])
def test_the_sum_of_examples_is_the_gradient_of_the_statistics(backend):
    set_backend(backend)
    dy = torch.randn(6, 301, 130).to(DEVICES[backend], torch.bfloat16)
    buffers = [torch.zeros(130, device=dy.device) for _ in range(2)]
    bias_grad_stats(dy, *buffers, scale=3.0)
    rows = rows_of(dy, scale=3.0).double()
    bound = 8 * UNIT * 3 * dy.double().abs().sum((0, 1))
    assert ((rows.sum(0) - buffers[0]).abs() <= bound).all()
    # Of equal first stages: squares differ by their own roundings alone.
    torch.testing.assert_close(buffers[1].double(), rows.square().sum(0), rtol=8 * UNIT, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", USABLE)
def test_same_bits_on_every_run(backend, dtype):
    set_backend(backend)
    dy = torch.randn(7, 301, 130).to(DEVICES[backend])
    runs = [rows_of(dy, dtype=dtype, gap=gap) for gap in (0, 0, 3)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


def test_same_bits_for_any_number_of_threads():
    dy, threads = torch.randn(5, 999, 530), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(rows_of(dy))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results[1:])


@pytest.mark.parametrize("backend", USABLE)
def test_infinities_and_nan_arrive(backend):
    set_backend(backend)
    dy = torch.zeros(1, 3, 4, device=DEVICES[backend])
    dy[0, 0, 1], dy[0, 1, 2], dy[0, :2, 3] = torch.inf, torch.nan, 3e38
    for dtype in (torch.float32, torch.bfloat16):
        want = torch.tensor([[0, torch.inf, torch.nan, torch.inf]], dtype=dtype, device=dy.device)
        torch.testing.assert_close(rows_of(dy, dtype=dtype), want, equal_nan=True)


def test_opcheck():
    dy, slab = torch.randn(2, 3, 5), torch.zeros(4, 9)
    torch.library.opcheck(OP.default, (dy, None, 2.0, slab[1:3, 2:7]))
    offsets = torch.tensor([0, 2, 6])
    out = torch.zeros(2, 5, dtype=torch.bfloat16)
    torch.library.opcheck(OP.default, (dy.view(6, 5), offsets, 2.0, out))


def test_autograd_learns_of_the_rows():
    dy, out = torch.randn(2, 3, 5), torch.zeros(2, 5)
    for call in (lambda: bias_example_grads(dy, out), lambda: OP(dy, None, 1.0, out)):
        before = out._version
        call()
        assert out._version > before


def test_a_tracer_sees_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda *a: bias_example_grads(*a))(torch.randn(2, 3, 5), torch.zeros(2, 5))
    assert "beft_ext.bias_example_grads" in traced.code


def bad_calls():
    """What does not fit, each with a word of the sentence that says so."""
    dy, rows, out = torch.randn(2, 3, 5), torch.randn(6, 5), torch.zeros(2, 5)
    for name, wrong in {
        "wider": torch.zeros(2, 6),
        "longer": torch.zeros(3, 5),
        "flat": torch.zeros(10),
        "three axes": torch.zeros(1, 2, 5),
        "half precision": out.half(),
        "double": out.double(),
        "integers": out.int(),
        "columns apart": torch.zeros(2, 10)[:, ::2],
        "transposed": torch.zeros(5, 2).T,
        "expanded": torch.zeros(5).expand(2, 5),
        "rows that overlap": torch.zeros(20).as_strided((2, 5), (4, 1)),
        "another device": torch.zeros(2, 5, device="meta"),
        "negative bit": torch._neg_view(torch.zeros(2, 5)),
        "sparse": out.to_sparse(),
    }.items():
        yield f"out {name}", (dy, None, 1.0, wrong), "out must be"
    yield "out single for double", (dy.double(), None, 1.0, out), "out must be"
    yield "out within grad_output", (dy, None, 1.0, dy[:, 1]), "share memory"
    yield "grad_output two axes", (rows, None, 1.0, out), r"\(B, T, H\)"
    yield "grad_output packed, three axes", (dy, torch.tensor([0, 2]), 1.0, out), r"\(N, H\)"
    yield "grad_output integers", (dy.int(), None, 1.0, out), "float"
    yield "grad_output sparse", (dy.to_sparse(), None, 1.0, out), "dense"
    for name, offsets in {
        "int32": torch.tensor([0, 3, 6], dtype=torch.int32),
        "no entry": torch.tensor([], dtype=torch.int64),
        "strided": torch.tensor([0, 3, 3, 6, 6])[::2],
        "another device": torch.tensor([0, 3, 6], device="meta"),
        "beyond the rows": torch.tensor([0, 3, 7]),
        "negative": torch.tensor([-1, 3, 6]),
        "descending": torch.tensor([0, 4, 3]),
    }.items():
        yield f"offsets {name}", (rows, offsets, 1.0, out), "example_offsets"


BAD = {name: (call, message) for name, call, message in bad_calls()}
VALUES = ("offsets beyond the rows", "offsets negative", "offsets descending")


@pytest.mark.parametrize("backend", [b for b in USABLE if DEVICES[b] == "cpu"])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_and_nothing_written(name, backend):
    call, message = BAD[name]
    set_backend(backend)
    before = call[3].clone()
    with pytest.raises(OperatorError, match=message) as error:
        OP(*call)
    assert "\n" not in str(error.value)
    dy, offsets, scale, out = call
    with pytest.raises(OperatorError, match=message):
        bias_example_grads(dy, out, example_offsets=offsets, scale=scale)
    assert out.is_meta or torch.equal(before.to_dense(), out.to_dense())


@pytest.mark.parametrize("name", BAD.keys() - set(VALUES))  # a fake tensor has no values
def test_a_fake_call_is_refused_as_well(name):
    call, message = BAD[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if any(isinstance(t, Tensor) and (t.is_neg() or t.is_sparse) for t in call):
            return  # no faithful fake of these
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in call]
        if "within" in name:
            fakes[3] = fakes[0][:, 1]
        with pytest.raises(OperatorError, match=message):
            OP(*fakes)


@pytest.mark.parametrize("name", ["out wider", "out transposed", "offsets int32", *VALUES])
def test_a_compiled_call_is_refused_when_it_runs(name):
    torch._dynamo.reset()
    call, message = BAD[name]
    compiled = torch.compile(lambda *a: OP(*a), fullgraph=True, backend="aot_eager")
    before = call[3].clone()
    with pytest.raises(OperatorError, match=message):
        compiled(*call)
    assert torch.equal(before, call[3])


def test_compiled_whole_is_the_same_as_eager():
    torch._dynamo.reset()

    def doubled(dy, offsets, slab):
        out = slab[:, 2:7]
        bias_example_grads(dy, out, example_offsets=offsets, scale=3.0)
        return out * 2

    compiled = torch.compile(doubled, fullgraph=True)
    for rows, edges in ((6, [0, 2, 2, 6]), (9, [1, 4, 8])):
        dy, offsets = torch.randn(rows, 5), torch.tensor(edges)
        runs = []
        for call in (doubled, compiled):
            slab = torch.ones(len(edges) - 1, 9, dtype=torch.bfloat16)
            runs.append([call(dy, offsets, slab), slab])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", USABLE)
def test_the_negative_bit_counts(backend):
    set_backend(backend)
    stored = torch.randn(2, 3, 5, dtype=torch.complex64, device=DEVICES[backend])
    dy = stored.conj().imag
    assert dy.is_neg()
    check(dy, [(0, 3), (3, 6)], scale=1.5)
    out = torch.zeros(2, 5, device=dy.device)
    OP(dy, None, 1.0, out)
    torch.testing.assert_close(out, -stored.imag.sum(1))


def test_a_tensor_whose_memory_was_freed_is_refused():
    dy, out = torch.randn(2, 3, 5), torch.zeros(2, 5)
    zero = torch._efficientzerotensor((2, 3, 5))
    dy.untyped_storage().resize_(0)
    for freed in (dy, zero):
        with pytest.raises(OperatorError, match="no memory"):
            bias_example_grads(freed, out)


def test_a_slab_may_hold_the_rows_of_several_biases_and_what_they_are_made_of():
    memory = torch.randn(64)
    dy, slab = memory[:30].view(2, 3, 5), memory[30:60].view(2, 15)
    for i in range(3):
        bias_example_grads(dy, slab[:, 5 * i : 5 * i + 5], scale=i)
    for i in range(3):
        torch.testing.assert_close(slab[:, 5 * i : 5 * i + 5], i * dy.sum(1))
