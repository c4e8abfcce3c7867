"""What Triton's AdamW step asks of memory and of the host: a state beyond 2^31 elements, and a step
that a CUDA graph can hold. Run by its interpreter, on tensors of the host.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels can't be checked")

TABLES = """
import mmap
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from beft_ext.ops import triton_bias_adamw_step as kernels
from beft_ext.ops.bias_adamw_tables import AdamWTables, Located, locate, workspace_size

GROUP = [0.5, 0.9, 0.999, 1e-8, 0.0, 1.0]


def tables(params, grads, state, at):
    blocks = [[i, i, 0, 0, at + 8 * i, len(p)] for i, p in enumerate(params)]
    return AdamWTables(
        locate(params, [0, 1]), Located(grads), state, torch.zeros(2), torch.zeros(2, 4),
        torch.tensor(blocks), torch.arange(3), [0, 1], [*GROUP, *GROUP], None, 1.0, None, None,
        torch.zeros(workspace_size(2, 2)),
    )


def made(state, at):
    params, grads = [torch.ones(5), torch.ones(8)], [torch.full((5,), 2.0), torch.full((8,), 3.0)]
    return tables(params, grads, state, at)

"""

FAR = """
# Memory that exists where it is touched. A row fits 32 bits; the third begins beyond 2^31.
elements = 2**30 + 2**12
memory = mmap.mmap(-1, 3 * 4 * elements, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
state = torch.frombuffer(memory, dtype=torch.float32).view(3, elements)
near = made(torch.zeros(3, 32), 8)
for at in (0, elements - 24):
    far = made(state, at)
    assert kernels.bias_adamw_step_triton(far) == kernels.bias_adamw_step_triton(near)
    assert torch.equal(state[:, at : at + 24], near.state[:, 8:])
    assert torch.equal(far.scores, near.scores)
    assert all(map(torch.equal, far.params, near.params))
    near = made(torch.zeros(3, 32), 8)
"""

CAPTURED = """
FROM_HOST = {"aten::lift_fresh", "aten::_local_scalar_dense"}


class Watched(TorchDispatchMode):
    seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.add(function.name().partition(".")[0])
        return function(*arguments, **(options or {}))


plain = made(torch.zeros(3, 32), 8)
norms = [kernels.bias_adamw_step_triton(plain) for _ in range(3)]
assert kernels._copied.cache_info()[:2] == (4, 2)  # nothing is copied again
kernels._capturing = lambda device: True
captured = made(torch.zeros(3, 32), 8)
with Watched() as watched:
    found = [kernels.bias_adamw_step_triton(captured) for _ in range(3)]
assert found == norms
assert not watched.seen & FROM_HOST, watched.seen
assert kernels._copied.cache_info()[:2] == (4, 2)
assert torch.equal(captured.state, plain.state) and torch.equal(captured.scores, plain.scores)
assert all(map(torch.equal, captured.params, plain.params))
"""


@pytest.mark.parametrize("case", [FAR, CAPTURED], ids=["far", "captured"])
def test_triton_step(case):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TABLES + case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
