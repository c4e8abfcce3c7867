"""How near are ``bias_grad_stats`` and ``bias_example_grads`` to the memory's limit? One thread and
all, against torch.

The limit is a plain read of the same bytes in the same rounds: the fastest of torch's flat sum, dot
and maximum. Writes benchmarks/results/<device>/operators.json.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import peers
import torch
from harness import Case, measure, settings, show, write
from torch import Tensor

from beft_ext.ops import backends, bias_example_grads, bias_grad_stats, set_backend

ROWS, WIDTHS = (1024, 4096, 16384), (768, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH = 16
BEYOND_CACHE = 1 << 28  # bytes of all inputs of a case together
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat sum": torch.sum,
    "flat dot": lambda x: torch.dot(x, x),
    "flat maximum": torch.amax,
}


def rotation(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """Gives random tensors in turn, so many that no cache holds the next one."""
    size = torch.Size(shape).numel() * dtype.itemsize
    count = min(64, max(2, BEYOND_CACHE // size))
    first = torch.randn(shape, device=device).to(dtype)
    return itertools.cycle([first, *(first.clone() for _ in range(count - 1))]).__next__


def backend_case(name: str, case: Case) -> Case:
    def call() -> None:
        set_backend(name)
        case()
        set_backend(None)

    return call


def row_cases(turn: Callable[[], Tensor], slab: Tensor, others: list[str]) -> dict[str, Case]:
    """The examples' gradients into a part of the slab's columns."""
    out = slab[:, : slab.shape[1] // 4]

    def ours() -> None:
        bias_example_grads(turn(), out)

    name = f"rows in {str(slab.dtype)[6:]}"
    return {
        f"{name}, ours": ours,
        **{f"{name}, ours, {n}": backend_case(n, ours) for n in others},
        f"{name}, torch": lambda: peers.eager_rows(turn(), out),
    }


def cases(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    turn = rotation(shape, dtype, device)
    target = torch.empty(shape, dtype=dtype, device=device)
    buffers = [torch.zeros(shape[-1], device=device) for _ in range(2)]
    slab = torch.zeros(shape[0], 4 * shape[-1], device=device)
    usable = [n for n, why in backends().items() if not why and n not in ("reference", "cpu")]
    others = usable if device == "cuda" else []

    def ours() -> None:
        bias_grad_stats(turn(), *buffers)

    compiled = torch.compile(peers.eager_stats, dynamic=False)
    made: dict[str, Case] = {
        "ours": ours,
        **{f"ours, {n}": backend_case(n, ours) for n in (*others, "reference")},
        "torch, compiled": lambda: compiled(turn(), *buffers),
        "torch, sum alone": lambda: turn().sum((0, 1)),
        **row_cases(turn, slab, others),
        **row_cases(turn, slab.bfloat16(), others),
        "copy": lambda: target.copy_(turn()),
        **{n: lambda f=f: f(turn().view(torch.float32).view(-1)) for n, f in READS.items()},
    }
    return {name: lambda case=case: case for name, case in made.items()}


def grid(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    rows, widths = ((256,), (64,)) if arguments.quick else (ROWS, WIDTHS)
    for n, width, dtype in itertools.product(rows, widths, DTYPES):
        shape = (BATCH, n // BATCH, width)
        torch.compiler.reset()
        found = measure(cases(shape, dtype, arguments.device), arguments)
        reads = [found.pop(name) for name in READS]
        found["plain read"] = min(reads, key=lambda s: s["median_s"])
        size = n * width * dtype.itemsize
        for name, s in found.items():
            if "missing" not in s:
                s["bytes_per_s"] = size * (2 if name == "copy" else 1) / s["median_s"]
        key = f"{n} x {width} {str(dtype)[6:]}"
        results[key] = found
        show(f"{key}, {torch.get_num_threads()} threads", found)
    return results


def main() -> None:
    arguments = settings(__doc__, rounds=9)
    everything = torch.get_num_threads()
    results: dict[str, Any] = {}
    for threads in dict.fromkeys((1, everything) if arguments.device == "cpu" else (everything,)):
        torch.set_num_threads(threads)
        results[str(threads)] = grid(arguments)
    write("operators", arguments, {"threads_used": results})


if __name__ == "__main__":
    main()
