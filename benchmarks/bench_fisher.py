"""What do the gradients of single examples, and their Fisher information, cost, beside every other
way to them?

Forward and backward of 16 x 128 tokens, with respect to all biases: time and peak memory. 'step'
sums squares over the examples; 'rows' keeps each example's gradient, or a projection of it, as TRAK
(Park et al. 2023, arXiv 2303.14186) does. Writes benchmarks/results/<device>/fisher.json.
"""

from __future__ import annotations

import functools
from typing import Any

from harness import measure, settings, show, write
from peers import FISHER, ROWS
from workloads import batch, chosen, classifier


def case(ways: dict[str, Any], which: str, config: dict[str, int], device: str) -> Any:
    return ways[which](classifier(config, device), batch(device))


def main() -> None:
    arguments = settings(__doc__, rounds=5)
    results: dict[str, dict[str, Any]] = {"step": {}, "rows": {}}
    for place, (name, config) in enumerate(chosen(arguments.quick).items()):
        rounds = max(2, arguments.rounds // (place + 1))  # the larger model takes longer
        for part, ways in (("step", FISHER), ("rows", ROWS)):
            makers = {w: functools.partial(case, ways, w, config, arguments.device) for w in ways}
            results[part][name] = measure(makers, arguments, rounds=rounds, memory=True)
            show(f"{name}, {part}", results[part][name])
    write("fisher", arguments, results)


if __name__ == "__main__":
    main()
