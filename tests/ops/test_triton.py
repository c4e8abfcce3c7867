"""The Triton kernels: right under the interpreter, and compilable for the GPUs we name.

The interpreter needs TRITON_INTERPRET set before triton is imported, so it runs in a process
of its own, which writes inputs and outputs to files; the float64 oracle is here.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels can't be checked")

SOURCE = Path(__file__).parents[2] / "beft_ext" / "ops" / "triton_bias_grad_stats.py"
SCALE = -0.625
UNIT = 2.0**-24  # of fp32

LOAD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("triton_bias_grad_stats", {str(SOURCE)!r})
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
"""

RUNNER = (
    LOAD
    + """
import json, sys
import numpy as np, torch

layouts = {
    "contiguous": lambda *shape: torch.randn(*shape),
    "transposed": lambda *shape: torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2),
    "tokens_first": lambda b, t, h: torch.randn(t, b, h).transpose(0, 1),
    "every_other": lambda *shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "expanded": lambda *shape: torch.randn(()).expand(shape),
}
# Each column sums to what only compensation keeps; the last overflows.
def special(rows, width):
    x = torch.full((1, rows, width), 0.7)
    x[0, 0], x[0, 500] = 2.0**24, -(2.0**24)
    x[0, :, -1] = 0
    x[0, :3, -1] = 3e38
    return x
layouts["special"] = lambda b, t, h: special(t, h)
folder, scale, cases = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
for name, (shape, dtype, layout, offsets, chunks) in cases.items():
    torch.manual_seed(0)
    x = layouts[layout](*shape).to(getattr(torch, dtype))
    start = torch.randn(2, shape[-1])
    if offsets is not None:
        offsets = torch.tensor(offsets)
    runs, rows = [], []
    batch = len(x) if offsets is None else len(offsets) - 1
    for _ in range(2):
        grad, (total, squares) = torch.full((shape[-1],), torch.nan), start.clone()
        kernels.bias_grad_stats_triton(x, offsets, chunks, scale, grad, total, squares)
        runs.append(torch.stack([grad, total, squares]).numpy())
    for kind in (torch.float32, torch.float32, torch.bfloat16):
        slab = torch.full((batch, shape[-1] + 3), torch.nan, dtype=kind)
        kernels.bias_example_grads_triton(x, offsets, chunks, scale, slab[:, 1:-2])
        rows.append(slab.float().numpy())
    np.savez(f"{folder}/{name}.npz", x=x.double().numpy(), start=start.double().numpy(), runs=runs,
             rows=rows)
"""
)

CASES = {  # name: (shape, dtype, layout, example offsets, chunks)
    "odd": ((3, 7, 5), "float32", "contiguous", None, 1),
    "prime": ((2, 131, 257), "float32", "contiguous", None, 3),
    "one_long_example": ((1, 1009, 33), "float32", "contiguous", None, 16),
    "many_examples": ((21, 3, 37), "float32", "contiguous", None, 2),
    "width_1": ((4, 67, 1), "float32", "contiguous", None, 1),
    "one_row": ((1, 1, 1), "float32", "contiguous", None, 1),
    "batch_0": ((0, 4, 3), "float32", "contiguous", None, 1),
    "tokens_0": ((2, 0, 3), "float32", "contiguous", None, 1),
    "width_0": ((2, 3, 0), "float32", "contiguous", None, 1),
    "bf16": ((3, 65, 131), "bfloat16", "contiguous", None, 2),
    "fp16": ((3, 65, 131), "float16", "contiguous", None, 1),
    "transposed": ((3, 37, 19), "float32", "transposed", None, 1),
    "tokens_first": ((3, 37, 19), "bfloat16", "tokens_first", None, 64),
    "every_other": ((3, 37, 19), "float16", "every_other", None, 1),
    "expanded": ((3, 37, 19), "float32", "expanded", None, 1),
    "packed": ((211, 17), "float32", "contiguous", [0, 5, 5, 150, 211], 4),
    "packed_transposed": ((211, 17), "bfloat16", "transposed", [0, 0, 199, 211], 4),
    "packed_nothing": ((0, 17), "float32", "contiguous", [0], 1),
    "packed_all_empty": ((0, 17), "float32", "contiguous", [0, 0, 0], 1),
    # Offsets beyond the rows are clamped to them; descending ones make an empty example.
    "clamped": ((40, 16), "float32", "contiguous", [-5, 20, 99], 3),
    "descending": ((40, 16), "float32", "contiguous", [30, 10, 40, 1], 2),
    "special": ((1, 512, 3), "float32", "special", None, 1),
    "special_chunks": ((1, 512, 3), "float32", "special", None, 8),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpreted")
    subprocess.run(
        [sys.executable, "-c", RUNNER, str(folder), str(SCALE), json.dumps(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    return folder


def sums(x, offsets):
    """Of each example, and of its absolute values, which errors are measured by: (B, H) each."""
    edges = np.clip(offsets, 0, len(x)) if offsets else None
    examples = [x[a:b] for a, b in itertools.pairwise(edges)] if offsets else list(x)
    shape = len(examples), x.shape[-1]
    plain = np.array([e.sum(axis=0) for e in examples]).reshape(shape)
    return plain, np.array([np.abs(e).sum(axis=0) for e in examples]).reshape(shape)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_match_float64(interpreted, name):
    (*_, offsets, _) = CASES[name]
    saved = np.load(interpreted / f"{name}.npz")
    x, (sum_before, squares_before), (run, again) = saved["x"], saved["start"], saved["runs"]
    width = x.shape[-1]
    if name.startswith("special"):
        assert np.isinf(run[:, -1]).tolist() == [True] * 3  # and not NaN
        x, run = x[..., :-1], run[:, :-1]
        # The errors of TwoSum carry the sum: the values themselves cancel.
        assert (np.abs(run[0] - x.sum((0, 1))) <= 2 * UNIT * np.abs(x.sum((0, 1)))).all()
        return
    per_example, magnitude = sums(x, offsets)

    # A compensated sum errs by about one unit of the sum of absolute values at the very most;
    # squaring doubles that, and each product and addition after it rounds once.
    grad = per_example.sum(axis=0)
    grad_bound = 2 * UNIT * magnitude.sum(axis=0)
    sum_bound = 4 * UNIT * (np.abs(sum_before) + abs(SCALE) * magnitude.sum(axis=0))
    squares = (SCALE * per_example) ** 2
    squares_bound = 8 * UNIT * (np.abs(squares_before) + ((SCALE * magnitude) ** 2).sum(axis=0))

    assert run.tobytes() == again.tobytes()
    if width == 0:
        return
    assert (np.abs(run[0] - grad) <= grad_bound).all()
    assert (np.abs(run[1] - (sum_before + SCALE * grad)) <= sum_bound).all()
    assert (np.abs(run[2] - (squares_before + squares.sum(axis=0))) <= squares_bound).all()


@pytest.mark.parametrize("name", CASES)
def test_interpreted_rows_match_float64(interpreted, name):
    (*_, offsets, _) = CASES[name]
    saved = np.load(interpreted / f"{name}.npz")
    x, (slab, again, rounded) = saved["x"], saved["rows"]
    assert slab.tobytes() == again.tobytes()
    # Nothing beside the rows is written.
    assert np.isnan(slab[:, [0, -2, -1]]).all() and np.isnan(rounded[:, [0, -2, -1]]).all()
    rows, rounded = slab[:, 1:-2], rounded[:, 1:-2]
    # Triton's interpreter cuts bits off where its compiler rounds: at most one last place.
    exact = rows[np.isfinite(rows)]
    assert (np.abs(rounded[np.isfinite(rows)] - exact) <= 2.0**-7 * np.abs(exact)).all()
    if name.startswith("special"):
        assert (rows[:, -1] == -np.inf).all()  # 3 * 3e38 * SCALE
        x, rows = x[..., :-1], rows[:, :-1]
    want, magnitude = sums(x, offsets)
    if name.startswith("special"):
        magnitude = np.abs(want)  # the errors of TwoSum carry the sum
    # One unit for the compensated sum, one for its value, one each for scale and product.
    assert (np.abs(rows - SCALE * want) <= 4 * UNIT * abs(SCALE) * magnitude).all()


COMPILER = (
    LOAD
    + """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

capability, dtype, packed = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "packed"

def compiled(kernel, pointers, scalars, constants, warps):
    kinds = {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm

def compiled_bytes(*kernel):
    return len(compiled(*kernel)["cubin"])

pointers = {"grad_output": f"*{dtype}", "sums": "*fp32", "errors": "*fp32"}
constants = {"stride_h": 1, "BLOCK_T": kernels.BLOCK_T, "BLOCK_H": kernels.MAX_BLOCK_H}
if packed:
    pointers["example_offsets"] = "*i64"
else:
    constants["example_offsets"] = None
ints = dict.fromkeys(["tokens", "width", "stride_b", "stride_t"], "i32")
first = compiled_bytes(kernels.partial_sums_kernel, pointers, ints, constants, 8)

pointers = dict.fromkeys(["sums", "errors", "grad", "sum_out", "sum_sq_out"], "*fp32")
ints = dict.fromkeys(["batch", "chunks", "width"], "i32")
tile = {"GROUPS": kernels.GROUPS, "COLUMNS": kernels.COLUMNS}
second = compiled_bytes(kernels.finish_columns_kernel, pointers, {**ints, "scale": "fp32"}, tile, 8)

ints = {**dict.fromkeys(["batch", "chunks", "width", "stride"], "i32"), "scale": "fp32"}
rows = [compiled(kernels.finish_rows_kernel,
                 {"sums": "*fp32", "errors": "*fp32", "out": f"*{kind}"},
                 ints, tile, 8) for kind in ("fp32", "bf16")]
# To nearest, ties to even: by an instruction, or by adding half of the last place less one.
assert "cvt.rn.bf16" in rows[1]["ptx"] or "32767" in rows[1]["ptx"]
print(json.dumps([first, second, *(len(row["cubin"]) for row in rows)]))
"""
)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [75, 120])
def test_kernels_compile_to_cubins(tmp_path, capability, dtype, layout):
    # An empty cache, so that this compiles; no interpreter, which would replace the compiler.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILER, str(capability), dtype, layout],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert all(size > 0 for size in json.loads(done.stdout))
