"""bias_grad_stats: every backend usable here against float64, on any shape, dtype and stride."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from beft_ext.ops import backends, bias_grad_stats, set_backend

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
    shape = [batch, tokens, width * step]
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn([shape[i] for i in order], generator=generator)
    stored = stored.to(DEVICES[backend], dtype)
    dy = stored.permute([order.index(i) for i in range(3)])[..., ::step]
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


@pytest.mark.parametrize(
    ("dy", "offsets", "message"),
    [
        (torch.zeros(2, 3), None, "must be \\(B, T, H\\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int32), None, "float"),
        (torch.zeros(1, 2, 4), None, "grad_sum"),
        (torch.zeros(4, 3), torch.tensor([0, 9]), "ascend"),
        (torch.zeros(4, 3), torch.tensor([2, 1]), "ascend"),
        (torch.zeros(4, 3), torch.tensor([0.0]), "int64"),
    ],
)
def test_bad_input_is_named(dy, offsets, message):
    with pytest.raises(ValueError, match=message):
        bias_grad_stats(dy, torch.zeros(3), torch.zeros(3), example_offsets=offsets)
