"""How much memory does a step take at its peak, beyond model and optimizer?

The cases of bench_statistics.py and bench_training.py. Prints and writes
benchmarks/results/<device>/memory.json.
"""

from __future__ import annotations

import argparse

import bench_statistics
import bench_training
from harness import peak_bytes, write

PARTS = {
    "statistics": (bench_statistics.step_case, list(bench_statistics.CASES)),
    "training": (bench_training.case, list(bench_training.CASES)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    results: dict[str, dict[str, dict[str, int]]] = {part: {} for part in PARTS}
    for part, (make, names) in PARTS.items():
        for model in bench_statistics.CONFIGS:
            found = {which: peak_bytes(make(model, which, device), device) for which in names}
            results[part][model] = found
            for which, peak in found.items():
                print(f"{part:<12} {model:<10} {which:<22} {peak / 2**20:9.1f} MiB", flush=True)
    write("memory", device, results)


if __name__ == "__main__":
    main()
