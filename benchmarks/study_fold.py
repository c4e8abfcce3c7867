"""Do the gains stay where the gradients are folded? The study's cells, whole and folded.

A cell's gains are told twice from the same rows: from whole gradients, and with a part of the
memory that these take. One line a cell and part, in benchmarks/results/study-folded.jsonl: what
each term explains, either way.

    python benchmarks/study_fold.py --data DIR
    python benchmarks/study_fold.py --data DIR --model FOLDER --name NAME
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from study import MINILM, RESULTS as CELLS, Cell, Record, place, results as lines_of
from study_ways import rank_correlation

from beft_ext import measure_gains
from beft_ext.files import whole_file
from beft_ext.selection import Gains

RESULTS = CELLS.with_name("study-folded.jsonl")
# What is kept with one of so many parts of the memory that whole gradients take.
PARTS = {1.9: "16 bits", 3.8: "8 bits", 7.5: "4 bits", 16: "4 bits, folded"}


def told(cell: Cell, memory: float) -> Gains:
    batches, observe = cell.batches(), cell.objective.observe
    return measure_gains(cell.model, batches, observe=observe, memory=memory, seed=cell.draw)


def measured(cell: Cell, at: Record) -> list[Record]:
    """A line for each part of the memory."""
    whole = told(cell, float("inf"))
    size = 4.0 * whole.examples * sum(whole.elements.values())
    return [
        at | {"part": part, "whole": whole.values, "folded": told(cell, size / part).values}
        for part in PARTS
    ]


def results() -> list[Record]:
    """What has been measured."""
    return lines_of(RESULTS)


def moved(line: Record) -> float:
    """By how much the gain of a term differs, at most."""
    return max(abs(line["folded"][t] - value) for t, value in line["whole"].items())


def reordered(line: Record) -> float:
    """The largest difference of the gains of two terms that folding puts in another order; 0
    where the order stays."""
    whole, folded = line["whole"], line["folded"]
    swapped = (
        whole[a] - whole[b]
        for a in whole
        for b in whole
        if whole[a] > whole[b] and folded[a] < folded[b]
    )
    return max(swapped, default=0.0)


def keep(lines: Sequence[Record]) -> None:
    """Write lines in the place of what there was of them."""
    known = {(*place(r), r["part"]): r for r in [*results(), *lines]}
    with whole_file(RESULTS) as temporary:
        text = "".join(json.dumps(line) + "\n" for line in known.values())
        temporary.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the demo's MiniLM")
    parser.add_argument("--name", default=MINILM, help="of the model, in the results")
    arguments = parser.parse_args(argv)
    known = {place(r) for r in results()}
    for record in lines_of():
        at = {key: record[key] for key in ("model", "task", "size", "draw")}
        if record["model"] != arguments.name or place(record) in known:
            continue
        found = measured(Cell(place(record), arguments.data, arguments.model), at)
        keep(found)
        for line in found:
            order = rank_correlation(line["whole"], line["folded"])
            print(*place(line), f"1/{line['part']}", f"{moved(line):.4f} {order:.3f}", flush=True)


if __name__ == "__main__":
    main()
