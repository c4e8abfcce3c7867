"""Writes docs/selection.md from what study.py measured."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beft_ext.selection.settling import FIRST, is_settled, next_look
from study import SELECTING, results

from beft_ext.files import whole_file
from beft_ext.scores import SCORES
from beft_ext.selection import SETTLE

OUT = Path(__file__).resolve().parents[1] / "docs" / "selection.md"
Record = dict[str, Any]
Chooser = Callable[[Record], str]


def choosers(steps: int) -> dict[str, Chooser]:
    """Each method's choice after some steps; and value, without any."""
    made: dict[str, Chooser] = {m: lambda r, m=m: r["choices"][str(steps)][m] for m in SCORES}  # type: ignore[misc]
    return made | {"always value": lambda r: "value"}


def judged(records: Sequence[Record], choose: Chooser) -> tuple[int, float, float]:
    """How often the choice trained best of all terms, and its mean and worst loss against the
    best."""
    lost = [max(r["reached"].values()) - r["reached"][choose(r)] for r in records]
    return sum(x <= 0 for x in lost), statistics.fmean(lost), max(lost)


def page(records: Sequence[Record]) -> str:
    count = len(records)
    best: dict[str, int] = {}
    for r in records:
        for term, value in r["reached"].items():
            best[term] = best.get(term, 0) + (value == max(r["reached"].values()))
    means = {t: statistics.fmean(r["reached"][t] for r in records) for t in best}
    pair = sum(r["reached"]["value"] >= r["reached"]["query"] for r in records)
    lines = [
        "# Does the selection pick the right term?",
        "",
        f"Written by `benchmarks/study_page.py` from {count} cells: MiniLM, each living term",
        f"trained alone with the head for {records[0]['steps']} steps of 16 examples, evaluated",
        "once on the whole validation split; `select` with its defaults for some steps. Cells:",
        f"{', '.join(_cells(records))}.",
        "",
        "```",
        "python benchmarks/study.py sst2:100 sst2:300 rte:300 --data DIR",
        "python benchmarks/study.py sentences:100 sentences:300",
        "python benchmarks/study_page.py",
        "```",
        "",
        "## What each method picks",
        "",
        f"How often the pick trained best of all terms, of {count}; what is lost against the best",
        "term, in points of accuracy (mean, worst); by steps of selection.",
        "",
        "| method | steps | best | lost, mean | lost, worst | picks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for steps in SELECTING:
        for name, choose in choosers(steps).items():
            if name == "always value" and steps != SELECTING[0]:
                continue
            hits, mean, worst = judged(records, choose)
            picks = ", ".join(sorted({choose(r) for r in records}))
            shown = "none" if name == "always value" else str(steps)
            row = (name, shown, str(hits), f"{100 * mean:.1f}", f"{100 * worst:.1f}", picks)
            lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "## What each term reaches",
        "",
        "| term | mean accuracy | best in |",
        "| --- | --- | --- |",
    ]
    for term, mean in sorted(means.items(), key=lambda item: -item[1]):
        lines.append(f"| {term} | {mean:.3f} | {best[term]} |")
    lines += ["", "## When is it settled?", "", *_settling(records)]
    lines += ["", "## What follows", "", *_conclusion(records, pair)]
    return "\n".join(lines) + "\n"


def stop(record: Record, risk: float, left_out: Sequence[str] = ()) -> tuple[int, str] | None:
    """The step at which a selection among all terms but ``left_out`` ends, and its first term."""
    looks, step = record["looks"], FIRST
    while str(step) in looks:
        seen = {t: v for t, v in looks[str(step)].items() if t not in left_out}
        means, errors = ({t: v[i] for t, v in seen.items()} for i in (0, 1))
        if is_settled(means, errors, risk):
            return step, max(means, key=lambda term: means[term])
        step = next_look(step)
    return None


def order(record: Record) -> list[str]:
    """The terms by the BEFT score at the end of the longest selection."""
    last = list(record["looks"].values())[-1]
    return sorted(last, key=lambda term: -last[term][0])


def _settling(records: Sequence[Record]) -> list[str]:
    """Of whole selections, and of those among the terms behind the first, the first two, ..."""
    lines = [
        f"`settle` ends a run early. How many of the selections of {SELECTING[-1]} steps it ended,",
        "after how many steps (median), and how often the first term then was not the first at",
        "their end: among all terms, and with those contests too that are left when the terms",
        "that come first are taken away one after another.",
        "",
        "| risk | contests | ended | steps | first differs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for risk, rest in itertools.product((0.01, 0.05, 0.2), (False, True)):
        contests = [(r, order(r)[:n]) for r in records for n in range(len(order(r)) - 1)]
        own = contests if rest else [(r, left) for r, left in contests if not left]
        ended = [(r, left, found) for r, left in own if (found := stop(r, risk, left))]
        wrong = sum(found[1] != order(r)[len(left)] for r, left, found in ended)
        steps = f"{statistics.median(f[0] for *_, f in ended):.0f}" if ended else "none"
        what = "with those left" if rest else "all terms"
        lines.append(f"| {risk} | {what} | {len(ended)} of {len(own)} | {steps} | {wrong} |")
    return lines


def _cells(records: Sequence[Record]) -> list[str]:
    """Seeds of each task and size."""
    places = [(r["task"], r["size"]) for r in records]
    return [
        f"{task} with {size} examples ({places.count((task, size))} seeds)"
        for task, size in dict.fromkeys(places)
    ]


def _conclusion(records: Sequence[Record], pair: int) -> list[str]:
    """In words that hold for the figures above, or not at all."""
    count, said = len(records), []
    by_beft = [[choosers(s)["beft"](r) for r in records] for s in SELECTING]
    same = sum(pick == "value" for pick in by_beft[-1])
    fewest = next((s for s, p in zip(SELECTING, by_beft, strict=True) if p == by_beft[-1]), None)
    said.append(
        f"- Of query and value, which the paper chooses between (the key is dead here), value is "
        f"no worse in {pair} of {count} cells; the BEFT score picks value in {same} of {count}."
    )
    if fewest is not None:
        said.append(f"- {fewest} steps give the BEFT score's pick of {SELECTING[-1]} steps.")
    mean = {n: judged(records, c)[1] for n, c in choosers(SELECTING[-1]).items()}
    least = min(mean, key=lambda n: mean[n])
    said.append(
        f"- The least is lost by {least} ({100 * mean[least]:.1f} points on average), the most by "
        f"{max(mean, key=lambda n: mean[n])} ({100 * max(mean.values()):.1f})."
    )
    top = max(
        records[0]["reached"], key=lambda t: statistics.fmean(r["reached"][t] for r in records)
    )
    if top not in ("query", "value"):
        said.append(
            f"- Trained alone, {top} does best on average. No method sees that: scores compare how "
            "far terms move in one common run, not what each could do alone."
        )
    if mean["beft"] <= mean["always value"]:
        ends = [found for r in records if (found := stop(r, SETTLE))]
        said.append(
            "- `--terms auto` goes by the BEFT score: on this study it is at least as good as "
            f"always taking value. It ends its selection at a risk of {SETTLE} (after "
            f"{statistics.median(f[0] for f in ends):.0f} steps in the median here), prints why "
            "it chose, and takes the value where scores are undefined."
        )
    return said


def main() -> None:
    with whole_file(OUT) as temporary:
        temporary.write_text(page(results()), encoding="utf-8")


if __name__ == "__main__":
    main()
