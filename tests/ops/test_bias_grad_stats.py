"""bias_grad_stats: every backend usable here against float64, on any shape, dtype and stride."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from strides import permuted
from torch import Tensor
from torch._subclasses import FakeTensorMode

from beft_ext.ops import OperatorError, backends, bias_grad_stats, set_backend
from beft_ext.ops.grad_output import chunk_count

DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
USABLE = [name for name in DEVICES if not backends()[name]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _any_backend_again():
    yield
    set_backend(None)


def oracle(dy: torch.Tensor, bounds: list[tuple[int, int]], scale: float):
    """float64 statistics and the sums of absolute values their errors are measured by."""
    rows = dy.double().cpu().numpy().reshape(-1, dy.shape[-1])
    g = np.array([rows[a:b].sum(0) for a, b in bounds]).reshape(len(bounds), rows.shape[1])
    size = np.array([np.abs(rows[a:b]).sum(0) for a, b in bounds]).reshape(g.shape)
    return g.sum(0), scale * g.sum(0), ((scale * g) ** 2).sum(0), size


def check(dy, offsets, bounds, scale, longest):
    width = dy.shape[-1]
    total, squares = (torch.zeros(width, device=dy.device) for _ in range(2))
    grad = bias_grad_stats(dy, total, squares, example_offsets=offsets, scale=scale)
    grad, total, squares = grad.cpu(), total.cpu(), squares.cpu()
    want_grad, want_sum, want_sq, size = oracle(dy, bounds, scale)
    # A plain fp32 sum of n terms errs by at most n * eps * sum |x|; ours stays below.
    bound = (longest + len(bounds) + 4) * np.finfo(np.float32).eps
    slack = 1e-37
    assert (abs(grad.numpy() - want_grad) <= bound * size.sum(0) + slack).all()
    assert (abs(total.numpy() - want_sum) <= bound * abs(scale) * size.sum(0) + slack).all()
    assert (
        abs(squares.numpy() - want_sq) <= 3 * bound * ((scale * size) ** 2).sum(0) + slack
    ).all()


@pytest.mark.parametrize("backend", USABLE)
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 7),
    tokens=st.integers(0, 300),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    order=st.permutations([0, 1, 2]),
    step=st.integers(1, 3),
    scale=st.floats(0.25, 64),
    seed=st.integers(0, 2**31),
)
def test_dense(backend, batch, tokens, width, dtype, order, step, scale, seed):
    set_backend(backend)
    dy = permuted(batch, tokens, width, order, step, dtype, DEVICES[backend], seed)
    check(dy, None, [(i * tokens, (i + 1) * tokens) for i in range(batch)], scale, tokens)


@pytest.mark.parametrize("backend", USABLE)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 280), max_size=6),
    margin=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
)
def test_packed(backend, lengths, margin, dtype):
    set_backend(backend)
    edges = np.cumsum([margin, *lengths])
    dy = torch.randn(int(edges[-1]) + margin, 33).to(DEVICES[backend], dtype)
    bounds = [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
    check(dy, torch.tensor(edges, device=dy.device), bounds, 1.5, max(lengths, default=0))


@pytest.mark.parametrize("backend", [b for b in USABLE if b != "reference"])
def test_millions_of_rows_err_by_rounding_alone(backend):
    set_backend(backend)
    dy = torch.rand(1, 4_000_000, 3).to(DEVICES[backend])
    total, squares = (torch.zeros(3, device=dy.device) for _ in range(2))
    grad = bias_grad_stats(dy, total, squares)
    want = dy.double().sum((0, 1))
    # Each chunk of 128 rows is at most 3 + 16 additions deep; the chunks are compensated.
    assert ((grad - want).abs() / want).max() <= 20 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", USABLE)
def test_same_bits_on_every_run(backend):
    set_backend(backend)
    dy, runs = torch.randn(7, 301, 130).to(DEVICES[backend]), []
    for _ in range(3):
        buffers = [torch.zeros(130, device=dy.device) for _ in range(2)]
        runs.append([bias_grad_stats(dy, *buffers), *buffers])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_same_bits_for_any_number_of_threads():
    dy, threads = torch.randn(5, 999, 130), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            buffers = torch.zeros(130), torch.zeros(130)
            results.append((bias_grad_stats(dy, *buffers), *buffers))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rows", [1, 8], ids=["single rows", "eight at once"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_exactly(dtype, rows):
    every = torch.arange(-(2**15), 2**15 + 1).to(torch.int16).view(dtype)
    dy = every.view(1, 1, -1).expand(1, rows, -1)
    grad = bias_grad_stats(dy, torch.zeros(len(every)), torch.zeros(len(every)))
    torch.testing.assert_close(grad, rows * every.float(), rtol=0, atol=0, equal_nan=True)


def test_opcheck():
    dy, buffers = torch.randn(2, 3, 5), (torch.zeros(5), torch.zeros(5))
    torch.library.opcheck(torch.ops.beft_ext.bias_grad_stats.default, (dy, None, 2.0, *buffers))


def test_autograd_learns_of_the_buffers_and_refuses_to_go_back_through():
    dy, buffers = torch.randn(2, 3, 5), (torch.zeros(5), torch.zeros(5))
    before = [b._version for b in buffers]
    bias_grad_stats(dy, *buffers)
    assert all(b._version > v for b, v in zip(buffers, before, strict=True))
    with pytest.raises(RuntimeError, match="bias_grad_stats"):
        bias_grad_stats(dy.requires_grad_(), *buffers).sum().backward()


def test_a_tracer_sees_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    arguments = torch.randn(2, 3, 5), torch.zeros(5), torch.zeros(5)
    traced = make_fx(lambda *a: bias_grad_stats(*a))(*arguments)
    assert "beft_ext.bias_grad_stats" in traced.code


def bad_calls():
    """What does not fit, each with a word of the sentence that says so."""
    dy, rows, buffers = torch.randn(2, 3, 5), torch.randn(6, 5), (torch.zeros(5), torch.zeros(5))
    wide = torch.zeros(20)
    for name, wrong in {
        "wider": wide[:6],
        "narrower": wide[:4],
        "half precision": torch.zeros(5, dtype=torch.bfloat16),
        "double": torch.zeros(5, dtype=torch.float64),
        "integers": torch.zeros(5, dtype=torch.int32),
        "strided": wide[:10:2],
        "expanded": wide[:1].expand(5),
        "two axes": wide[:5].view(1, 5),
        "another device": torch.zeros(5, device="meta"),
        "negative bit": torch._neg_view(torch.zeros(5)),
        "sparse": torch.zeros(5).to_sparse(),
    }.items():
        yield f"sum {name}", (dy, None, 1.0, wrong, buffers[1]), "grad_sum "
        yield f"squares {name}", (dy, None, 1.0, buffers[0], wrong), "grad_sum_sq"
    yield "one buffer twice", (dy, None, 1.0, buffers[0], buffers[0]), "share memory"
    yield "buffers overlap", (dy, None, 1.0, wide[:5], wide[4:9]), "share memory"
    yield "two axes", (rows, None, 1.0, *buffers), r"\(B, T, H\)"
    yield "three axes packed", (dy, torch.tensor([0, 2]), 1.0, *buffers), r"\(N, H\)"
    yield "integers", (dy.int(), None, 1.0, *buffers), "float"
    yield "complex", (dy.to(torch.complex64).conj(), None, 1.0, *buffers), "float"
    yield "sparse", (dy.to_sparse(), None, 1.0, *buffers), "dense"
    for name, offsets in {
        "int32": torch.tensor([0, 6], dtype=torch.int32),
        "floats": torch.tensor([0.0, 6.0]),
        "bool": torch.tensor([False, True]),
        "no entry": torch.tensor([], dtype=torch.int64),
        "a number": torch.tensor(6),
        "two axes": torch.tensor([[0, 6]]),
        "strided": torch.tensor([0, 3, 6, 6])[::2],
        "another device": torch.tensor([0, 6], device="meta"),
        "beyond the rows": torch.tensor([0, 7]),
        "far beyond": torch.tensor([0, 2**62]),
        "beyond in between": torch.tensor([0, 7, 6]),
        "negative": torch.tensor([-1, 6]),
        "far below": torch.tensor([-(2**62), 6]),
        "descending": torch.tensor([0, 4, 3, 6]),
    }.items():
        yield f"offsets {name}", (rows, offsets, 1.0, *buffers), "example_offsets"


BAD = {name: (call, message) for name, call, message in bad_calls()}
VALUES = ("beyond", "far", "negative", "descending")  # of offsets: a fake tensor has none


def same_as_before(call, before):
    pairs = zip(before, call[3:], strict=True)
    return all(torch.equal(b.to_dense(), a.to_dense()) for b, a in pairs if not a.is_meta)


@pytest.mark.parametrize("backend", [b for b in USABLE if DEVICES[b] == "cpu"])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_and_nothing_written(name, backend):
    call, message = BAD[name]
    set_backend(backend)
    before = [b.clone() for b in call[3:]]
    with pytest.raises(OperatorError, match=message) as error:
        torch.ops.beft_ext.bias_grad_stats(*call)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)
    dy, offsets, scale, *buffers = call
    with pytest.raises(OperatorError, match=message):
        bias_grad_stats(dy, *buffers, example_offsets=offsets, scale=scale)
    assert same_as_before(call, before)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wider", "torch.float32 of shape (6,) on cpu"),
        ("double", "torch.float64 of shape (5,) on cpu"),
        ("strided", "torch.float32 of shape (5,) on cpu, not contiguous"),
        ("another device", "torch.float32 of shape (5,) on meta"),
        ("sparse", "torch.float32 of shape (5,) on cpu, torch.sparse_coo"),
        ("negative bit", "torch.float32 of shape (5,) on cpu, with the negative bit: call "
         "resolve_neg() on it"),
    ],
)  # fmt: skip
def test_the_sentence_says_what_was_given_and_what_was_expected(name, said):
    call, _ = BAD[f"sum {name}"]
    with pytest.raises(OperatorError) as error:
        torch.ops.beft_ext.bias_grad_stats(*call)
    expected = "a contiguous torch.float32 tensor of shape (5,) on cpu"
    assert str(error.value) == f"grad_sum must be {expected}, but is {said}"


@pytest.mark.parametrize("name", BAD)
def test_a_fake_call_is_refused_as_well(name):
    call, message = BAD[name]
    if name.startswith("offsets") and name.split()[1] in VALUES:
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if any(isinstance(t, Tensor) and (t.is_neg() or t.is_sparse) for t in call):
            return  # no faithful fake of these
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in call]
        if name in ("one buffer twice", "buffers overlap"):
            whole = torch.zeros(20)
            fakes[3:] = whole[:5], whole[4:9]
        with pytest.raises(OperatorError, match=message):
            torch.ops.beft_ext.bias_grad_stats(*fakes)


COMPILED = ["sum wider", "sum half precision", "squares strided", "buffers overlap"]
COMPILED += ["offsets " + n for n in ("int32", "no entry", "beyond the rows", "descending")]


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_call_is_refused_when_it_runs(name):
    torch._dynamo.reset()
    call, message = BAD[name]
    compiled = torch.compile(
        lambda *a: torch.ops.beft_ext.bias_grad_stats(*a), fullgraph=True, backend="aot_eager"
    )
    before = [b.clone() for b in call[3:]]
    with pytest.raises(OperatorError, match=message):
        compiled(*call)
    assert same_as_before(call, before)


def test_compiled_whole_is_the_same_as_eager():
    torch._dynamo.reset()

    def both(dy, offsets, *buffers):
        return bias_grad_stats(dy, *buffers, example_offsets=offsets, scale=3.0) * 2

    compiled = torch.compile(both, fullgraph=True)
    for rows, edges in ((6, [0, 2, 2, 6]), (9, [1, 4, 8])):
        dy, offsets = torch.randn(rows, 5), torch.tensor(edges)
        runs = []
        for call in (both, compiled):
            buffers = torch.ones(5), torch.ones(5)
            runs.append([call(dy, offsets, *buffers), *buffers])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", USABLE)
def test_the_negative_bit_counts(backend):
    set_backend(backend)
    stored = torch.randn(2, 3, 5, dtype=torch.complex64, device=DEVICES[backend])
    dy = stored.conj().imag
    assert dy.is_neg()
    check(dy, None, [(0, 3), (3, 6)], 1.5, 3)
    buffers = [torch.zeros(5, device=dy.device) for _ in range(2)]
    grad = torch.ops.beft_ext.bias_grad_stats(dy, None, 1.0, *buffers)
    torch.testing.assert_close(grad, -stored.imag.sum((0, 1)))


def test_a_tensor_whose_memory_was_freed_is_refused():
    dy, buffers = torch.randn(2, 3, 5), (torch.zeros(5), torch.zeros(5))
    zero = torch._efficientzerotensor((2, 3, 5))
    dy.untyped_storage().resize_(0)
    for freed in (dy, zero):
        with pytest.raises(OperatorError, match="no memory"):
            bias_grad_stats(freed, *buffers)
    empty = torch.empty(2, 0, 5)
    assert not bias_grad_stats(empty, *buffers).any()


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((16, 128, 768), 2),  # 96 blocks, 11 chunks for 1024, but of 64 rows at least
        ((1, 100_000, 128), 256),
        ((1, 6400, 128), 100),
        ((1, 6401, 129), 101),
        ((100, 6400, 128), 11),
        ((1023, 6400, 128), 2),
        ((1024, 6400, 128), 1),
        ((0, 5, 3), 1),
        ((2, 0, 3), 1),
        ((2, 3, 0), 1),
    ],
)
def test_the_gpus_chunks_follow_from_the_shape(shape, chunks):
    assert chunk_count(*shape) == chunks


def test_a_buffer_that_shares_memory_with_what_is_read():
    # Everything is read before the first write.
    stored = torch.randn(2, 3, 5)
    want = stored.sum((0, 1)), stored[0, 0] + stored.sum((0, 1))
    buffers = stored[0, 0], torch.zeros(5)
    torch.testing.assert_close(bias_grad_stats(stored, *buffers), want[0])
    torch.testing.assert_close(buffers[0], want[1])
