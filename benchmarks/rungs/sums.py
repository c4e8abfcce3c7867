"""The ladder of ``bias_grad_stats``: sums.cpp, built and called."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from beft_ext.ops.checks import DTYPE_CODES

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
# Those of setup.py that a kernel's code depends on.
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-pthread", "-fPIC", "-shared"]
# In the order in which docs/kernels.md climbs them; all but the last run on one thread.
RUNGS = ("columns", "rows", "one_pass", "doubles", "vectors", "eight_rows", "halves", "ahead")
RUNGS += ("threads",)

Rung = Callable[[Tensor], tuple[Tensor, Tensor]]


class _Input(ctypes.Structure):
    """``Input`` of sums.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "batch", "tokens", "width", "threads")),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """sums.cpp, compiled once a process.

    Raises: RuntimeError where there is no compiler, or it fails.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("g++ is not on PATH: install it to build the rungs")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "sums.so"
        command = [compiler, *FLAGS, f"-I{CSRC}", HERE / "sums.cpp", "-ldl", "-o", built]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ could not build the rungs: {done.stderr.strip()}")
        return ctypes.CDLL(str(built))


def rung(name: str) -> Rung:
    """One rung as a function of ``dY``.

    Args:
        name: one of ``RUNGS``.
    Shape: it takes ``(B, T, H)``, contiguous, fp32, bf16 or fp16, and gives two of ``(H,)`` fp32.
    Returns: a function that gives ``sum_i g_i`` and ``sum_i g_i^2``.
    Raises: RuntimeError as ``library``.
    """
    function = library()[name]

    def call(dy: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(2, dy.shape[2])
        given = _Input(dy.data_ptr(), DTYPE_CODES[dy.dtype], *dy.shape, torch.get_num_threads())
        function(ctypes.byref(given), *(ctypes.c_void_p(x.data_ptr()) for x in out))
        return out[0], out[1]

    return call
