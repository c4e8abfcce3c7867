"""What does each rung of docs/kernels.md bring, from the plain loop to today's kernels?

Of ``bias_grad_stats`` the rungs are those of the CPU: on a GPU today's kernel stands alone between
a plain read and torch. The optimizer's step climbs on either. Writes
benchmarks/results/<device>/rungs.json.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import bench_operators
import bench_optimizer
import torch
import workloads
from harness import Case, measure, settings, show, write
from rungs import steps, sums
from torch import Tensor

from beft_ext.ops import bias_grad_stats, checks, dispatch
from beft_ext.training.optim import BiasAdamW

SHAPE, QUICK = (workloads.BATCH, workloads.TOKENS, 4096), (2, 16, 64)
SETS, RATE = ("BERT-base", "OPT-6.7B"), 1e-3
STEP_BYTES = 32  # of an element at least: five reads and three writes in fp32
ALONE = ", one thread"
Work = Callable[[Tensor], Any]


def kernel(dy: Tensor) -> tuple[Tensor, Tensor]:
    """Today's kernel at its C++ entry, without the operator around it."""
    if dispatch.native is None:
        raise RuntimeError("the native module is missing: reinstall with a C++17 compiler")
    out = torch.zeros(3, dy.shape[2])
    layout = checks.DTYPE_CODES[dy.dtype], *dy.shape, *dy.stride(), 0  # no offsets
    addresses = (x.data_ptr() for x in out)
    threads = torch.get_num_threads()
    dispatch.native.bias_grad_stats_cpu(dy.data_ptr(), *layout, 1.0, threads, *addresses)
    return out[0], out[2]


def operator(dy: Tensor) -> tuple[Tensor, Tensor]:
    """The same as the package calls it."""
    total, squares = torch.zeros(2, dy.shape[2], device=dy.device)
    return bias_grad_stats(dy, total, squares), squares


def works(device: str) -> dict[str, tuple[int, Callable[[], Work]]]:
    """Threads, and what makes the work, of each case by name."""
    every = torch.get_num_threads()
    today: dict[str, Work] = {"kernel": kernel} if device == "cpu" else {}
    today |= {"ours": operator, "torch, sum alone": lambda dy: dy.sum((0, 1))}
    for name, read in bench_operators.READS.items():
        today[name] = lambda dy, read=read: read(dy.view(torch.float32).view(-1))
    made = {name: (every, lambda work=work: work) for name, work in today.items()}
    if device == "cuda":
        return made
    climb = {
        n: (every if n == "threads" else 1, functools.partial(sums.rung, n)) for n in sums.RUNGS
    }
    return climb | {name + ALONE: (1, make) for name, (_, make) in made.items()} | made


def case(threads: int, make: Callable[[], Work], turn: Callable[[], Tensor]) -> Case:
    work = make()

    def call() -> None:
        torch.set_num_threads(threads)
        work(turn())

    return call


def error(found: Any, dy: Tensor) -> dict[str, float]:
    """The larger of both results' distances from those in float64, relative to these."""
    if not isinstance(found, tuple):
        return {}
    grads = dy.double().sum(1)
    wanted = grads.sum(0), grads.square().sum(0)
    off = [float((x - w).norm() / w.norm()) for x, w in zip(found, wanted, strict=True)]
    return {"error": max(off)}


def climb_sums(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    every, device = torch.get_num_threads(), arguments.device
    shape = QUICK if arguments.quick else SHAPE
    for dtype in bench_operators.DTYPES:
        turn = bench_operators.rotation(shape, dtype, device)
        cases = works(device)
        found = measure(
            {n: functools.partial(case, *how, turn) for n, how in cases.items()}, arguments
        )
        torch.set_num_threads(every)
        for name, s in found.items():
            if "missing" not in s:
                dy = turn()
                s["bytes_per_s"] = dy.nbytes / s["median_s"]
                s |= error(cases[name][1]()(dy), dy)
        for suffix in ("",) if device == "cuda" else (ALONE, ""):
            reads = [found.pop(name + suffix) for name in bench_operators.READS]
            found["plain read" + suffix] = min(reads, key=lambda s: s["median_s"])
        key = " x ".join(map(str, shape)) + f" {str(dtype)[6:]}"
        results[key] = found
        show(key, found)
    return results


def ours(params: list[Tensor], lr: float) -> Case:
    step: Case = BiasAdamW(params, lr=lr).step
    return step


def climb_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    sets = {"tiny": [8] * 4} if arguments.quick else {n: bench_optimizer.SETS[n] for n in SETS}
    for name, widths in sets.items():
        makers = {
            which: functools.partial(stepped, make, widths, arguments.device)
            for which, make in (*steps.RUNGS.items(), ("ours", ours))
        }
        results[name] = measure(makers, arguments, repeat=5)
        for s in results[name].values():
            if "missing" not in s:
                s["bytes_per_s"] = STEP_BYTES * sum(widths) / s["median_s"]
        show(f"{name} ({len(widths)}, {sum(widths):,})", results[name])
    return results


def stepped(make: Callable[[list[Tensor], float], Case], widths: list[int], device: str) -> Case:
    params = [torch.randn(w, device=device).requires_grad_() for w in widths]
    for p in params:
        p.grad = torch.randn_like(p)
    return make(params, RATE)


def main() -> None:
    arguments = settings(__doc__, rounds=21)
    found = {"sums": climb_sums(arguments), "steps": climb_steps(arguments)}
    write("rungs", arguments, found)


if __name__ == "__main__":
    main()
