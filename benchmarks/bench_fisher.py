"""What does the per-example Fisher information of all biases cost, beside every other way to it?

Forward and backward of 16 x 128 tokens: time and peak memory. Writes
benchmarks/results/<device>/fisher.json.
"""

from __future__ import annotations

import functools
from typing import Any

from harness import measure, settings, show, write
from peers import FISHER
from workloads import batch, chosen, classifier


def case(which: str, config: dict[str, int], device: str) -> Any:
    return FISHER[which](classifier(config, device), batch(device))


def main() -> None:
    arguments = settings(__doc__, rounds=5)
    results: dict[str, Any] = {}
    for place, (name, config) in enumerate(chosen(arguments.quick).items()):
        makers = {w: functools.partial(case, w, config, arguments.device) for w in FISHER}
        rounds = max(2, arguments.rounds // (place + 1))  # the larger model takes longer
        results[name] = measure(makers, arguments, rounds=rounds, memory=True)
        show(name, results[name])
    write("fisher", arguments, {"step": results})


if __name__ == "__main__":
    main()
