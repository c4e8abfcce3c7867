"""How do time and memory grow as batch, length, layers and width double?

A training step of the value bias with per-example statistics; the exponent is the slope of a
straight line through the logarithms. Writes benchmarks/results/<device>/growth.json.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from harness import measure, settings, show, write
from ways import WAYS, Training
from workloads import batch, classifier

BASE = {"batch": 4, "tokens": 64, "layers": 2, "width": 256}
DOUBLINGS = 4


def case(batch_size: int, tokens: int, layers: int, width: int, device: str) -> Training:
    config = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    model = classifier({**config, "num_attention_heads": 4}, device)
    return Training(WAYS["ours, with statistics"], model, [batch(device, batch_size, tokens)])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(values) over log(sizes), by least squares."""
    xs, ys = [math.log(s) for s in sizes], [math.log(v) for v in values]
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    rise = sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True))
    return rise / sum((x - x0) ** 2 for x in xs)


def main() -> None:
    arguments = settings(__doc__, rounds=5)
    results: dict[str, Any] = {}
    for axis, start in BASE.items():
        sizes = [start * 2**k for k in range(2 if arguments.quick else DOUBLINGS)]
        makers = {}
        for size in sizes:
            b, t, n, w = ({**BASE, axis: size}).values()
            makers[str(size)] = functools.partial(case, b, t, n, w, arguments.device)
        found = measure(makers, arguments, memory=True)
        show(axis, found)
        exponents = {
            key: exponent(sizes, [found[str(size)][key] for size in sizes])
            for key in ("median_s", "peak_bytes")
        }
        print(f"{axis}: {exponents}")
        results[axis] = {"sizes": found, "exponents": exponents}
    write("growth", arguments, {"axes": results})


if __name__ == "__main__":
    main()
