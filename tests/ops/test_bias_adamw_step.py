"""The GPU's AdamW step without a GPU: Triton by its interpreter and compiled ahead of time, CUDA
by fibers of the host (cuda_emulator.py). Each takes the CPU's place under
BiasAdamW and must move parameters as torch.optim.AdamW does in float64, with the scores of the
reference.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from cuda_emulator import build, emulated

CHECK = """
import sys
import torch
import beft_ext.ops.bias_adamw_step as operator
from beft_ext.ops import set_backend
from beft_ext.ops.checks import DTYPE_CODES
from beft_ext.training.optim import BiasAdamW

SIZES = ((7,), (2500,), (3, 33))
EPS = torch.finfo(torch.float32).eps
CUTS = 0.0


def params(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in SIZES]


def run(options, dtype=torch.float32, missing=None, skipped=None, scale=None, steps=4):
    ours, twins = params(dtype), params(dtype)
    theirs = [p.detach().double().requires_grad_() for p in ours]
    optimizer = BiasAdamW(ours, lr=1e-2, **options)
    twin = BiasAdamW(twins, lr=1e-2, **options)
    plain = {"weight_decay": 0.0} | {k: v for k, v in options.items() if k != "max_grad_norm"}
    other = torch.optim.AdamW(theirs, lr=1e-2, **plain)
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        for i, (a, t, b) in enumerate(zip(ours, twins, theirs)):
            g = torch.randn(a.shape, generator=generator).to(dtype)
            a.grad = t.grad = None if (i, step) == missing else g
            b.grad = None if (i, step) == missing else g.double() / (scale or 1.0)
        if scale is not None:
            for o in (optimizer, twin):
                o.grad_scale = torch.tensor(scale)
                o.found_inf = torch.tensor(float(step == skipped))
        set_backend("reference")
        twin.step()
        set_backend(None)
        optimizer.step()
        if step == skipped:
            assert optimizer.grad_norm == twin.grad_norm == torch.inf
            continue
        if "max_grad_norm" in options:
            torch.nn.utils.clip_grad_norm_(theirs, options["max_grad_norm"])
        other.step()
        torch.testing.assert_close(optimizer.grad_norm, twin.grad_norm, rtol=1e-5, atol=0)
    for a, b in zip(ours, theirs):
        value = optimizer.state[a].get("master", a).detach().double()
        # Each step rounds the value once and its own size, at most a few lr, a few times.
        assert (value - b).abs().max() <= steps * EPS * (b.abs().max() + 8e-2)
        # Triton's interpreter cuts bits off where its compiler rounds: at most one last place.
        last_place = CUTS * torch.finfo(dtype).eps * value.abs()
        assert ((a.detach().double() - value.to(dtype).double()).abs() <= last_place).all()
        assert optimizer.state[a]["step"] == other.state[b]["step"]
    for name, want in twin.scores().items():
        found = optimizer.scores()[name]
        for x, y in zip(vars(found).values(), vars(want).values()):
            assert abs(x - y) <= 1e-4 * abs(y), (name, found, want)
    # Every call leaves the counters behind the sums at zero for the next.
    flat = optimizer._flats[0]
    assert not flat.workspace[4 * len(flat.blocks):].any()
    return [p.detach().clone() for p in ours]


class TensorRates(BiasAdamW):
    def _settings(self):
        return super()._settings()[0], [torch.tensor(0.25), torch.tensor(0.5)]


def rates_of_two_groups():
    ours = params(torch.float32)
    before = [p.detach().clone() for p in ours]
    optimizer = TensorRates([{"params": ours[:1]}, {"params": ours[1:]}])
    for p in ours:
        p.grad = torch.ones_like(p)
    optimizer.step()  # the first step is of the rate's length
    for p, b, rate in zip(ours, before, (0.25, 0.5, 0.5)):
        torch.testing.assert_close(b - p.detach(), torch.full_like(b, rate), rtol=1e-5, atol=1e-6)


def a_written_parameter_holds(dtype):
    p = torch.ones(5, dtype=dtype, requires_grad=True)
    optimizer = BiasAdamW([p], lr=1e-4)
    p.grad = torch.ones_like(p)
    optimizer.step()
    kept = optimizer.state[p]["master"].clone()
    p.data[:2] = 4.0
    optimizer.step()
    moved = torch.tensor([4.0, 4.0, *kept[2:]]) - optimizer.state[p]["master"]
    torch.testing.assert_close(moved, torch.full((5,), 1e-4), rtol=1e-2, atol=0)


class OverDevices(BiasAdamW):
    def _entries(self):
        return [[entry] for entries in super()._entries() for entry in entries]


def devices_are_clipped_together():
    ours, twins = params(torch.float32), params(torch.float32)
    for kind, ps in ((BiasAdamW, ours), (OverDevices, twins)):
        optimizer = kind(ps, lr=0.1, eps=1.0, max_grad_norm=0.5)  # eps: size matters
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for a, b in zip(ours, twins):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def wild_tables_reach_nothing():
    # A parameter, its gradient and its state in the middle of memory that is to stay as it is.
    whole, grads = (torch.ones(5000, dtype=torch.bfloat16) for _ in range(2))
    p = whole[2000:2007].requires_grad_()
    optimizer = BiasAdamW([p])
    p.grad = grads[2000:2007]
    flat = optimizer._flats[0]
    room = torch.ones(5000)
    flat.state = room[2000:2028].view(4, 7)
    for column in range(6):
        for value in (-900, 3, 900, 2000):
            whole[2000:2007], room[2000:2028] = 1.0, 0.0
            blocks = flat.blocks.clone()
            blocks[0, column] = value
            work, groups = flat.look(), optimizer._settings()[0]
            operator.bias_adamw_step(operator.AdamWTables(
                work.params, work.grads, flat.state, flat.steps, flat.scores, blocks,
                torch.tensor([0, value]), flat.group_of, groups, None, 1.0, None, None,
                torch.zeros_like(flat.workspace),
            ))
            for memory, end in ((whole, 2007), (room, 2028)):
                assert (memory[:2000] == 1).all() and (memory[end:] == 1).all(), (column, value)


install()
rates_of_two_groups()
devices_are_clipped_together()
for dtype in (torch.bfloat16, torch.float16):
    a_written_parameter_holds(dtype)
wild_tables_reach_nothing()
run({"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6})
first = run({"max_grad_norm": 1.0, "maximize": True})
again = run({"max_grad_norm": 1.0, "maximize": True})
assert all(torch.equal(a, b) for a, b in zip(first, again))
run({}, missing=(1, 2))
run({"max_grad_norm": 0.5}, missing=(0, 1), scale=512.0, skipped=2)
for dtype in (torch.bfloat16, torch.float16):
    run({"max_grad_norm": 1.0}, dtype=dtype, steps=3)
"""

TRITON = """
def install():
    global CUTS
    operator._BACKENDS["cpu"], CUTS = operator._triton, 1.0


"""


def execute(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_interpreted_triton_kernels_step_as_adamw():
    pytest.importorskip("triton", reason="triton is not installed: its kernels can't be checked")
    execute(CHECK.replace("install()\n", TRITON + "install()\n", 1), TRITON_INTERPRET="1")


COMPILER = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import beft_ext.ops.triton_bias_adamw_step as kernels

POINTERS = {"tensors": "*i64", "blocks": "*i64", "first_blocks": "*i64"}
INTS = ("elements", "tensor_count", "block_count")
CONSTANTS = {"BLOCK": kernels.BLOCK, "SLOTS": kernels.SLOTS}


def size(kernel):
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name in CONSTANTS:
            signature[name], constants[name] = "constexpr", CONSTANTS[name]
        else:
            signature[name] = "i32" if name in INTS else POINTERS.get(name, "*fp32")
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"num_warps": 4, **kernels.EXACT}
    return len(triton.compile(source, target=target, options=options).asm["cubin"])


found = [kernels.norm_kernel, kernels.step_kernel, kernels.finish_kernel]
print(json.dumps([size(kernel) for kernel in found]))
"""


@pytest.mark.parametrize("capability", [75, 120])
def test_triton_kernels_compile_to_cubins(tmp_path, capability):
    pytest.importorskip("triton", reason="triton is not installed: its kernels can't be checked")
    # An empty cache, so that this compiles.
    assert all(json.loads(execute(COMPILER, capability, TRITON_CACHE_DIR=str(tmp_path))))


GLUE = r"""
extern "C" int step(const beft::AdamWTensor* tensors, const beft::AdamWGroup* groups,
                    int group_count, const beft_cuda::AdamWTables* tables) {
  return beft_cuda::bias_adamw_step(tensors, groups, group_count, *tables, nullptr);
}
"""

CUDA = """
import ctypes

library = ctypes.CDLL(sys.argv[1])
P, I, L, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double


class Entry(ctypes.Structure):
    _fields_ = [("param", P), ("grad", P), ("dtype", L), ("group", L), ("own", L), ("its", L)]


class Tables(ctypes.Structure):
    names = "blocks first state steps scores lr scale inf clip_by sums counters norm"
    _fields_ = [(n, P) for n in names.split()] + [("elements", L), ("max_grad_norm", D)]
    _fields_ += [("block_count", I), ("segments", I), ("tensors", I)]


def emulated(t):
    entries = (Entry * len(t.params))(*[
        (p.data_ptr(), 0 if g is None else g.data_ptr(), DTYPE_CODES[p.dtype], i,
         operator.reach(p), p.numel())
        for p, g, i in zip(t.params, t.grads, t.group_of)
    ])
    norm = torch.zeros(())
    at = lambda t: 0 if t is None else t.data_ptr()
    count = len(t.blocks)
    tables = Tables(
        at(t.blocks), at(t.first_blocks), at(t.state), at(t.steps), at(t.scores), at(t.lr),
        at(t.grad_scale), at(t.found_inf), at(t.global_norm), at(t.workspace),
        at(t.workspace) + 16 * count, at(norm), t.state.shape[1], t.max_grad_norm, count,
        len(t.first_blocks) - 1, len(t.params),
    )
    own = (D * len(t.groups))(*t.groups)
    assert library.step(entries, own, len(t.groups) // 6, ctypes.byref(tables)) == 0
    return norm


def install():
    operator._BACKENDS["cpu"] = emulated
"""


def test_emulated_cuda_kernels_step_as_adamw(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    library = tmp_path / "emulated.so"
    build(emulated("bias_adamw_step.cu") + GLUE, library, "-shared", "-Xcompiler=-fPIC")
    execute(CHECK.replace("install()\n", CUDA + "\n\ninstall()\n", 1), library)
