"""The GPU's AdamW step without a GPU: Triton by its interpreter and compiled ahead of time, CUDA
by threads of the host. Each takes the CPU's place under BiasAdamW and must move parameters as
torch.optim.AdamW does in float64, with the scores of the reference.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from cuda_emulator import emulated

CHECK = """
import sys
import torch
import beft_ext.ops.bias_adamw_step as operator
from beft_ext.ops import set_backend
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
    plain = {"weight_decay": 0.0} | {k: v for k, v in options.items() if k != "max_norm"}
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
            continue
        if "max_norm" in options:
            torch.nn.utils.clip_grad_norm_(theirs, options["max_norm"])
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


install()
run({"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6})
first = run({"max_norm": 1.0, "maximize": True})
again = run({"max_norm": 1.0, "maximize": True})
assert all(torch.equal(a, b) for a, b in zip(first, again))
run({}, missing=(1, 2))
run({"max_norm": 0.5}, missing=(0, 1), scale=512.0, skipped=2)
for dtype in (torch.bfloat16, torch.float16):
    run({"max_norm": 1.0}, dtype=dtype, steps=3)
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
CONSTANTS = {"BLOCK": kernels.BLOCK, "SLOTS": kernels.SLOTS}


def size(kernel):
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name in CONSTANTS:
            signature[name], constants[name] = "constexpr", CONSTANTS[name]
        else:
            signature[name] = "i32" if name == "elements" else POINTERS.get(name, "*fp32")
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    source = ASTSource(kernel, signature, constexprs=constants)
    return len(triton.compile(source, target=target, options={"num_warps": 4}).asm["cubin"])


found = [kernels.norm_kernel, kernels.step_kernel, kernels.finish_kernel]
print(json.dumps([size(kernel) for kernel in found]))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile_to_cubins(tmp_path, capability):
    pytest.importorskip("triton", reason="triton is not installed: its kernels can't be checked")
    # An empty cache, so that this compiles.
    assert all(json.loads(execute(COMPILER, capability, TRITON_CACHE_DIR=str(tmp_path))))


GLUE = r"""
extern "C" int step(const beft_cuda::AdamWTensor* tensors, const beft::AdamWGroup* groups,
                    int group_count, const beft_cuda::AdamWTables* tables) {
  return beft_cuda::bias_adamw_step(tensors, groups, group_count, *tables, nullptr);
}
"""

CUDA = """
import ctypes

library = ctypes.CDLL(sys.argv[1])
P, I, L, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double


class Entry(ctypes.Structure):
    _fields_ = [("param", P), ("grad", P), ("dtype", I), ("group", I)]


class Tables(ctypes.Structure):
    names = "blocks first state steps scores lr scale inf sums counters norm"
    _fields_ = [(n, P) for n in names.split()] + [("elements", L), ("max_norm", D)]
    _fields_ += [("block_count", I), ("segments", I), ("tensors", I)]


def emulated(params, grads, state, steps, scores, blocks, first, group_of, groups, lr, max_norm,
             scale, inf, workspace):
    entries = (Entry * len(params))(*[
        (p.data_ptr(), 0 if g is None else g.data_ptr(), operator.DTYPES[p.dtype], i)
        for p, g, i in zip(params, grads, group_of)
    ])
    norm = torch.zeros(())
    at = lambda t: 0 if t is None else t.data_ptr()
    tables = Tables(
        at(blocks), at(first), at(state), at(steps), at(scores), at(lr), at(scale), at(inf),
        at(workspace), at(workspace) + 16 * len(blocks), at(norm), state.shape[1], max_norm,
        len(blocks), len(first) - 1, len(params),
    )
    own = (D * len(groups))(*groups)
    assert library.step(entries, own, len(groups) // 6, ctypes.byref(tables)) == 0
    return norm


def install():
    operator._BACKENDS["cpu"] = emulated
"""


def test_emulated_cuda_kernels_step_as_adamw(tmp_path):
    nvcc = shutil.which("nvcc") or pytest.skip("nvcc is not on PATH")
    source, library = tmp_path / "emulated.cpp", tmp_path / "emulated.so"
    source.write_text(emulated("bias_adamw_step.cu") + GLUE)
    command = [nvcc, "-x", "c++", "-std=c++20", "-O2", "-shared", "-Xcompiler=-fPIC,-pthread,-w"]
    done = subprocess.run([*command, source, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    execute(CHECK.replace("install()\n", CUDA + "\n\ninstall()\n", 1), library)
