"""What the CUDA kernels are called with, without a GPU: in their place stand the CPU's, which find
everything at the addresses and sizes that they are handed.
"""

import ctypes
import importlib
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from beft_ext.ops import OperatorError, bias_grad_stats, dispatch
from beft_ext.ops.grad_output import chunk_count
from beft_ext.training.optim import BiasAdamW

STREAM = 77
# The package has the function of the same name.
adamw, stats = (
    importlib.import_module(f"beft_ext.ops.{n}") for n in ("bias_adamw_step", "bias_grad_stats")
)
native = dispatch.native
pytestmark = pytest.mark.skipif(native is None, reason="the native module is not built")


def number_at(address):
    return ctypes.c_float.from_address(address).value


def tensor_at(address, kind, *shape):
    """The memory at an address, as the CPU's kernels take it."""
    array = (kind * math.prod(shape)).from_address(address)
    dtype = torch.int64 if kind is ctypes.c_int64 else torch.float32
    return torch.frombuffer(array, dtype=dtype).view(shape)


def written(address, size):
    """A kernel may write to all of its scratch."""
    ctypes.memset(address, 0, 4 * size)


def stats_cuda(data, dtype, batch, tokens, width, *rest):
    *strides, offsets, chunks, scale, workspace, grad, total, squares, stream = rest
    assert stream == STREAM and chunks == chunk_count(batch, tokens, width)
    written(workspace, 2 * batch * chunks * width)
    layout = (data, dtype, batch, tokens, width, *strides, offsets)
    assert native.bias_grad_stats_cpu(*layout, scale, 1, grad, total, squares)


def adamw_cuda(params, grads, forms, groups, blocks, count, first, segments, state, size, *rest):
    steps, scores, workspace, norm, lr, most, global_norm, scale, infinite, stream = rest
    assert stream == STREAM
    bounds = (ctypes.c_int64 * (segments + 1)).from_address(first)
    assert bounds[0] == 0 and bounds[segments] == count
    written(workspace, 4 * count + segments + 1)
    if infinite and number_at(infinite):
        found = float("inf")
    else:
        if lr:
            groups = list(groups)
            groups[::6] = [number_at(lr + 4 * i) for i in range(len(groups) // 6)]
        found = native.bias_adamw_step_cpu(
            params, grads, forms, groups,
            tensor_at(blocks, ctypes.c_int64, count, 6),
            tensor_at(state, ctypes.c_float, 4, size),
            tensor_at(steps, ctypes.c_float, len(params) // 8),
            tensor_at(scores, ctypes.c_float, segments, 4),
            most,
            number_at(global_norm) if global_norm else -1.0,
            1 / number_at(scale) if scale else 1.0, 1,
        )  # fmt: skip
    ctypes.c_float.from_address(norm).value = found


@pytest.fixture
def stand_in(monkeypatch):
    """Calls of the CPU's kernels go to CUDA's, which are the CPU's behind CUDA's arguments."""
    module = SimpleNamespace(
        **{name: getattr(native, name) for name in dir(native) if not name.startswith("_")}
    )
    module.bias_grad_stats_cuda, module.bias_adamw_step_cuda = stats_cuda, adamw_cuda
    module.bias_adamw_step_limits = (3, 2)
    monkeypatch.setattr(dispatch, "native", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for operator in (adamw, stats):
        monkeypatch.setitem(operator._BACKENDS, "cpu", operator._cuda)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_statistics(stand_in, packed, dtype):
    dy = torch.randn(3, 7, 200).to(dtype).transpose(0, 1)[:, :, ::2]
    offsets = None
    if packed:
        dy, offsets = dy.reshape(21, 100).t().contiguous().t(), torch.tensor([1, 1, 4, 20])
    rows = [dy[a:b] for a, b in ((1, 1), (1, 4), (4, 20))] if packed else list(dy)
    g = torch.stack([r.double().sum(0) for r in rows])
    buffers = torch.ones(100), torch.ones(100)
    grad = bias_grad_stats(dy, *buffers, example_offsets=offsets, scale=0.5)
    for found, want in (
        (grad, g.sum(0)),
        (buffers[0], 1 + g.sum(0) / 2),
        (buffers[1], 1 + g.square().sum(0) / 4),
    ):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


def stepped(scaled, clip, lr):
    sizes = ((5,), (2500,), (4, 3))
    ps = [torch.linspace(-1, 1, 2500)[: torch.Size(s).numel()].view(s) for s in sizes]
    ps = [p.clone().requires_grad_() for p in ps]
    ps[0] = ps[0].detach().bfloat16().requires_grad_()  # so that there are masters
    groups = [{"params": ps[:2]}, {"params": ps[2:], "lr": lr, "weight_decay": 0.1}]
    optimizer = BiasAdamW(groups, lr=0.1, max_grad_norm=clip)
    norms = []
    for step in range(3):
        for i, p in enumerate(ps):
            p.grad = None if (i, step) == (1, 1) else torch.full_like(p, 1.0 + i)
        if scaled:
            optimizer.grad_scale = torch.tensor(4.0)
            optimizer.found_inf = torch.tensor(float(step == 2))
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return [*ps, *(s["step"] for s in optimizer.state.values())], norms, optimizer.scores()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_step(request, scaled, clip):
    plain = stepped(scaled, clip, 0.2)
    request.getfixturevalue("stand_in")
    found = stepped(scaled, clip, 0.2)
    assert all(map(torch.equal, found[0], plain[0]))
    assert found[1] == plain[1] and found[2] == plain[2]


def test_a_step_beyond_the_tables_of_the_kernel_is_refused(stand_in):
    def step(groups):
        for group in groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        BiasAdamW(groups).step()

    def tensors(n):
        return {"params": [torch.ones(2).requires_grad_() for _ in range(n)]}

    step([tensors(2), tensors(1)])
    for groups in ([tensors(4)], [tensors(1), tensors(1), tensors(1)]):
        with pytest.raises(OperatorError, match="at most 3 tensors in 2 groups"):
            step(groups)
