"""Missing barriers, fences and atomics of the CUDA kernels, without a GPU: ``python tests/races``.

Runs the kernels by tests/ops/cuda_emulator.h under ThreadSanitizer, once a seed: the real ones,
where nothing may be found, and copies with a fault each, which must be found.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "ops"))
from cuda_emulator import build, emulated  # noqa: E402

FOUND_IN = 0.95  # of the seeds
STATS, ADAMW = "bias_grad_stats.cu", "bias_adamw_step.cu"
DRIVERS = {STATS: "statistics.cpp", ADAMW: "optimizer.cpp"}


class Fault(NamedTuple):
    """``old`` in a kernel's file, replaced by ``new``. All kernels have one."""

    name: str
    file: str
    old: str
    new: str


FAULTS = [
    Fault(
        "partial_sums, finish_columns: slots are read before they are written",
        STATS,
        "    }\n    __syncthreads();\n    if (group < half) {",
        "    }\n    if (group < half) {",
    ),
    Fault(
        "partial_sums, finish_columns: slots are written before they are read",
        STATS,
        "    __syncthreads();\n  }\n}\n",
        "  }\n}\n",
    ),
    Fault(
        "finish_rows: groups write one row",
        STATS,
        "blockIdx.x / strips * kGroups + threadIdx.y;",
        "blockIdx.x / strips * kGroups;",
    ),
    Fault(
        "gradient_norm, adamw_step: a sum before its slots are filled",
        ADAMW,
        "  slots[threadIdx.x] = mine;\n  __syncthreads();\n",
        "  slots[threadIdx.x] = mine;\n",
    ),
    Fault(
        "gradient_norm, adamw_step: no barrier within the tree",
        ADAMW,
        "    __syncthreads();\n  }\n  const float4 total",
        "  }\n  const float4 total",
    ),
    Fault(
        "gradient_norm, adamw_step: no fence before the counter",
        ADAMW,
        "    __threadfence();\n    last = atomicAdd",
        "    last = atomicAdd",
    ),
    Fault(
        "gradient_norm, adamw_step: no fence behind the counter",
        ADAMW,
        "    __threadfence();\n  }\n  __syncthreads();\n  const bool",
        "  }\n  __syncthreads();\n  const bool",
    ),
    Fault(
        "gradient_norm, adamw_step: the counter is no atomic",
        ADAMW,
        "atomicAdd(counter, 1u)",
        "(*counter)++",
    ),
    Fault(
        "gradient_norm, adamw_step: who is last is read before it is known",
        ADAMW,
        "  __syncthreads();\n  const bool found = last;",
        "  const bool found = last;",
    ),
    Fault(
        "adamw_step: who is last is written before all have read it",
        ADAMW,
        "  const bool found = last;\n  __syncthreads();\n",
        "  const bool found = last;\n",
    ),
    Fault(
        "adamw_step: factors are read before they are there",
        ADAMW,
        "    }\n    __syncthreads();\n    mine = tensor.dtype",
        "    }\n    mine = tensor.dtype",
    ),
]


def missing() -> str:
    """Why this cannot run here, or nothing."""
    for tool in ("nvcc", "g++"):
        if shutil.which(tool) is None:
            return f"{tool} is not on PATH"
    command = ["g++", "-print-file-name=libtsan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "" if Path(found).is_absolute() else "libtsan.so is not installed"


def share_found(file: str, old: str, new: str, seeds: range) -> float:
    """Share of the seeds in which the kernels of a file, with a fault, fail."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kernels"
        driver = (HERE / DRIVERS[file]).read_text(encoding="utf-8")
        build(emulated(file, small=True, fault=(old, new)) + driver, program, watched=True)
        environment = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_signal_unsafe=0"}
        failed = 0
        for seed in seeds:
            done = subprocess.run([program, str(seed)], env=environment, capture_output=True)
            failed += done.returncode != 0
    return failed / len(seeds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=100)
    seeds = range(parser.parse_args().seeds)
    reason = missing()
    if reason:
        print(f"races: skipped, {reason}")
        return 0
    wrong = 0
    for file in DRIVERS:
        share = share_found(file, "", "", seeds)
        print(f"races: {share:4.0%} {file} as it is", flush=True)
        wrong += share > 0
    for fault in FAULTS:
        share = share_found(*fault[1:], seeds)
        print(f"races: {share:4.0%} {fault.name}", flush=True)
        wrong += share < FOUND_IN
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
