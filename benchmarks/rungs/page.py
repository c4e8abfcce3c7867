"""docs/kernels.md's figures and tables, from benchmarks/results/<device>/rungs.json.

They stand between marks, ``<!-- NAME -->`` and ``<!-- / -->``: ``sums rows`` for a rung's GB/s on
the CPU, ``cpu sums`` for a device's whole table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import tables

MARK = re.compile(r"(<!-- (\w[\w ]*) -->).*?(<!-- / -->)", re.DOTALL)
DEVICES, PARTS = ("cpu", "cuda"), ("sums", "steps")
NOT_YET = "Not yet measured."


def filled(page: str, records: Mapping[str, tables.Record]) -> str:
    """``page`` with what the records, by device, hold for each of its marks.

    Raises: KeyError for a mark that is none of theirs.
    """
    contents = {f"{d} {p}": table(records.get(d), p) for d in DEVICES for p in PARTS}
    for part in PARTS:
        groups = list(records["cpu"][part].values()) if "cpu" in records else []
        for case in groups[0] if groups else ():
            contents[f"{part} {case}"] = ", ".join(speed(group[case]) for group in groups)
    return MARK.sub(lambda mark: mark[1] + contents[mark[2]] + mark[3], page)


def speed(s: tables.Record) -> str:
    return "missing" if "missing" in s else f"{s['bytes_per_s'] / 1e9:.3g}"


def table(record: tables.Record | None, part: str) -> str:
    """A row for each case; GB/s of each group, the step's time too, and the error where it is."""
    if record is None:
        return NOT_YET
    groups = record[part]
    first = next(iter(groups.values()))
    errors = any("error" in s for s in first.values())
    rows = [["GB/s", *groups, *(["error"] if errors else [])]]
    rows.append(["---"] * len(rows[0]))
    for case in first:
        cells = [speed(group[case]) for group in groups.values()]
        if part == "steps":
            cells = [c + took(g[case]) for c, g in zip(cells, groups.values(), strict=True)]
        found = [f"{first[case]['error']:.1e}" if "error" in first[case] else ""]
        rows.append([case.replace("_", " "), *cells, *(found if errors else [])])
    lines = [tables.line(*row) for row in rows]
    return "\n".join(["", "", f"{tables.provenance(record)}.", "", *lines, "", ""])


def took(s: tables.Record) -> str:
    return "" if "missing" in s else f" in {tables.time(s['median_s'])}"
