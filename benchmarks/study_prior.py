"""The prior of ``--terms auto``, fitted to the study's cells; a test holds the package to it.

By how much a term explains more than the mean of all, in each task: the mean over the task's
cells of ``LARGE`` examples and more. A prior's mean is the mean over tasks, its spread what tasks
differ by (with a mean that is fitted to them too).

    python benchmarks/study_prior.py    # prints PRIORS of beft_ext/selection/choice.py
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from study import MINILM, RESULTS, Record, results

ONE_RATE = RESULTS.with_name("study-one-rate.jsonl")
LARGE = 250  # examples, at least
FAMILIES = {MINILM: "encoder"}  # by model; those of any other are "other"
FEWEST = 3  # tasks, without which the spread is the widest
WIDEST = 0.2


def above(record: Record) -> dict[str, float]:
    """What each term explains more than the mean of all."""
    values = record["gain"]["values"]
    middle = statistics.fmean(values.values())
    return {term: value - middle for term, value in values.items()}


def cells(family: str) -> list[Record]:
    """The large cells of a family's models; of a cell that was measured twice, the later."""
    found = {}
    for record in [
        {"model": MINILM, "draw": r.get("seed"), **r} for r in results(ONE_RATE)
    ] + results():
        if FAMILIES.get(record["model"], "other") == family and record["size"] >= LARGE:
            found[record["model"], record["task"], record["size"], record["draw"]] = record
    return list(found.values())


def by_task(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, float]]:
    """The means over a task's cells, by model and task."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for record in records:
        found.setdefault((record["model"], record["task"]), []).append(above(record))
    return {
        at: {t: statistics.fmean(own[t] for own in several) for t in several[0]}
        for at, several in found.items()
    }


def fitted(records: Sequence[Record]) -> tuple[dict[str, float], float]:
    """Means by term, those that are not 0.00, and the spread; to two digits after the point."""
    tasks = list(by_task(records).values())
    terms = {term for own in tasks for term in own}
    values = {t: [own[t] for own in tasks if t in own] for t in sorted(terms)}
    means = {t: round(statistics.fmean(v), 2) for t, v in values.items()}
    if len(tasks) < FEWEST:
        return _sorted(means), WIDEST
    variance = statistics.fmean(statistics.variance(v) for v in values.values() if len(v) > 1)
    # The mean of n tasks is itself off by 1/n of the variance.
    return _sorted(means), round(math.sqrt(variance * (1 + 1 / len(tasks))), 2)


def _sorted(means: Mapping[str, float]) -> dict[str, float]:
    return {t: m for t, m in sorted(means.items(), key=lambda item: -item[1]) if m}


def main() -> None:
    for family in ("encoder", "other"):
        own = cells(family)
        means, spread = fitted(own)
        tasks = ", ".join(sorted({r["task"] for r in own})) or "no cell"
        print(f"{family}: {means}, {spread}, {len(own)} cells ({tasks})")


if __name__ == "__main__":
    main()
