"""Writes docs/selection.md from what study.py measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from study import LR, SELECTING, Record, results

from beft_ext.files import whole_file
from beft_ext.scores import SCORES
from beft_ext.selection import Choice, Gains
from beft_ext.selection.choice import PRIORS, Prior, weighed
from beft_ext.selection.gain_result import MARGIN, SURE

OUT = Path(__file__).resolve().parents[1] / "docs" / "selection.md"
SPREAD = PRIORS["encoder"].spread
LARGE = 300  # examples of the cells that a prior is fitted to
WRONG = 1.0  # point of accuracy lost, or more
Way = Callable[[Record], list[str]]  # the term that is picked; of several, one by chance


def gains_of(record: Record) -> Gains:
    """A cell's gains; what a choice does not look at is left empty."""
    found, nothing = record["gain"], {"bands": {}, "steps": {}, "elements": {}, "curve": {}}
    more = {"ranking": list(found["values"]), "frontier": [], "dead": [], "folded": False}
    return Gains.of(nothing | more | found)


def prior_without(records: Sequence[Record], task: str) -> Prior:
    """Fitted to the large cells of the other tasks."""
    above: dict[str, list[float]] = {}
    for r in records:
        if r["task"] != task and r["size"] == LARGE:
            values = r["gain"]["values"]
            for term, value in values.items():
                above.setdefault(term, []).append(value - statistics.fmean(values.values()))
    means = {term: statistics.fmean(found) for term, found in above.items()}
    return Prior(means, SPREAD, "the other tasks")


def ways(records: Sequence[Record]) -> dict[tuple[str, str], Way]:
    """By name and number of steps."""
    picks: dict[tuple[str, str], Way] = {
        ("gain", "none"): lambda r: [gains_of(r).best],
        ("auto", "none"): lambda r: [chosen(records, r).term],
        ("always mlp_up", "none"): lambda r: ["mlp_up"],
        ("always value", "none"): lambda r: ["value"],
        ("chance", "none"): lambda r: list(r["reached"]),
    }
    return picks | {(m, str(n)): by_score(m, n) for n in SELECTING for m in SCORES}


def by_score(method: str, steps: int) -> Way:
    return lambda r: [r["choices"][str(steps)][method]]


def chosen(records: Sequence[Record], record: Record) -> Choice:
    """What auto picks, with a prior that never saw the task."""
    return weighed(gains_of(record), prior_without(records, record["task"]))


def lost(record: Record, terms: Sequence[str]) -> float:
    """Points of accuracy against the best term."""
    reached = record["reached"]
    return 100 * (max(reached.values()) - statistics.fmean(reached[t] for t in terms))


def hit(record: Record, terms: Sequence[str]) -> float:
    """Whether the best term was picked; a share where several are."""
    reached = record["reached"]
    return statistics.fmean(reached[t] == max(reached.values()) for t in terms)


def rank_correlation(found: Mapping[str, float], reached: Mapping[str, float]) -> float:
    """Spearman's, over the terms of ``found``; equal values share their mean rank."""
    return statistics.correlation(*(_ranks([v[t] for t in found]) for v in (found, reached)))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(w < v for w in values) + sum(w == v for w in values) / 2 for v in values]


def page(records: Sequence[Record]) -> str:
    lines = [
        "# Does the selection pick the right term?",
        "",
        f"Written by `benchmarks/study_page.py` from {len(records)} cells: MiniLM, each living",
        f"term trained alone with the head for {records[0]['steps']} steps of 16 examples at the",
        f"rate {LR}, evaluated once on the whole validation split. Cells:",
        f"{', '.join(_cells(records))}.",
        "",
        "```",
        "python benchmarks/study.py sst2:100 sst2:300 rte:300 --data DIR",
        "python benchmarks/study.py sentences:100 sentences:300",
        "python benchmarks/study_page.py",
        "```",
        "",
        *("## What each way picks", "", *_picks(records), ""),
        *("## Is it right about being sure?", "", *_sureness(records), ""),
        *("## Does it order the terms?", "", *_orders(records), ""),
        *("## What each term reaches", "", *_terms(records), ""),
        *("## What follows", "", *_conclusion(records), ""),
        *("## What this does not tell", "", *_limits()),
    ]
    return "\n".join(lines) + "\n"


def by_size(records: Sequence[Record]) -> dict[int, list[Record]]:
    sizes = sorted({r["size"] for r in records})
    return {size: [r for r in records if r["size"] == size] for size in sizes}


def _cells(records: Sequence[Record]) -> list[str]:
    """Seeds of each task and size."""
    places = [(r["task"], r["size"]) for r in records]
    return [
        f"{task} with {size} examples (seeds: {places.count((task, size))})"
        for task, size in dict.fromkeys(places)
    ]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _picks(records: Sequence[Record]) -> list[str]:
    sized = by_size(records)
    heads = [f"{size}: {head}" for size in sized for head in ("best", "lost, mean", "lost, worst")]
    lines = [
        "How often the pick trained best of all terms; what is lost against the best term, in",
        "points of accuracy. 'gain' takes the largest gain. 'auto' weighs the gains and a prior,",
        "as `--terms auto` does; its prior here is fitted to the cells of the other tasks with",
        f"{LARGE} examples: a term's mean gain above the mean of all terms, with a spread of",
        f"{SPREAD}. The prior that ships is fitted to sentences and SST-2. 'chance' is the mean",
        "over all terms. The others are scores of `select`, with its defaults, after some steps.",
        "",
        _row("picked by", "steps", *heads, "picks"),
        _row(*["---"] * (3 + len(heads))),
    ]
    for (name, steps), way in ways(records).items():
        cells: list[str] = []
        for own in sized.values():
            hits, losses = sum(hit(r, way(r)) for r in own), [lost(r, way(r)) for r in own]
            cells += [f"{hits:.3g} of {len(own)}"]
            cells += [f"{statistics.fmean(losses):.1f}", f"{max(losses):.1f}"]
        picks = sorted({term for r in records for term in way(r)})
        lines.append(_row(name, steps, *cells, "all" if name == "chance" else ", ".join(picks)))
    return lines


def _sureness(records: Sequence[Record]) -> list[str]:
    lines = [
        f"'auto' is sure where its confidence is at least {SURE}: the probability that no rival",
        f"explains {MARGIN} more. A pick is wrong here where it lost more than {WRONG:.0f} point.",
        "",
        _row("examples", "sure", "wrong when sure", "wrong when not sure", "sure and wrong in"),
        _row(*["---"] * 5),
    ]
    for size, own in by_size(records).items():
        wrong: dict[bool, list[bool]] = {True: [], False: []}
        where = []
        for r in own:
            choice = chosen(records, r)
            wrong[choice.sure].append(lost(r, [choice.term]) > WRONG)
            where += [r["task"]] if choice.sure and wrong[True][-1] else []
        shown = [f"{sum(wrong[sure])} of {len(wrong[sure])}" for sure in (True, False)]
        sure = f"{len(wrong[True])} of {len(own)}"
        lines.append(_row(size, sure, *shown, ", ".join(where) or "none"))
    return lines


def orders(record: Record) -> dict[str, dict[str, float]]:
    """The gains, and each score after the most steps, by term."""
    return {"gain": record["gain"]["values"]} | record["scores"]


def _orders(records: Sequence[Record]) -> list[str]:
    sized = by_size(records)
    lines = [
        "Rank correlation (Spearman's) of the gain, and of each score after",
        f"{SELECTING[-1]} steps, with the accuracy that the terms reach: mean over the cells.",
        "",
        _row("", *(f"{size} examples" for size in sized)),
        _row(*["---"] * (1 + len(sized))),
    ]
    for name in orders(records[0]):
        found = (
            statistics.fmean(rank_correlation(orders(r)[name], r["reached"]) for r in own)
            for own in sized.values()
        )
        lines.append(_row(name, *(f"{value:.2f}" for value in found)))
    return lines


def _terms(records: Sequence[Record]) -> list[str]:
    lines = [_row("term", "mean accuracy", "best in"), _row(*["---"] * 3)]
    means = {t: statistics.fmean(r["reached"][t] for r in records) for t in records[0]["reached"]}
    for term, mean in sorted(means.items(), key=lambda item: -item[1]):
        best = sum(hit(r, [term]) for r in records)
        lines.append(_row(term, f"{mean:.3f}", f"{best:.0f} of {len(records)}"))
    return lines


def _conclusion(records: Sequence[Record]) -> list[str]:
    """In words that hold for the figures above, or not at all."""
    picks, said = ways(records), []
    means = {
        (name, size): statistics.fmean(lost(r, way(r)) for r in own)
        for size, own in by_size(records).items()
        for (name, steps), way in picks.items()
        if steps in ("none", str(SELECTING[-1]))
    }
    small = min(by_size(records))
    for size in by_size(records):
        gain, value, up = (means[n, size] for n in ("gain", "always value", "always mlp_up"))
        said.append(
            f"- With {size} examples the largest gain loses {gain:.1f} points, always taking value "
            f"{value:.1f}, always taking mlp_up {up:.1f}."
        )
    if means["gain", small] > 2 * means["auto", small]:
        said.append(
            f"- With {small} examples the gain alone is noise. The prior mends that: auto loses "
            f"{means['auto', small]:.1f} points."
        )
    autos = {chosen(records, r).term for r in records}
    if len(autos) == 1:
        said.append(
            f"- Auto picks {autos.pop()} in every cell. The prior is from the same model, so auto "
            "is as good as always taking that term here, and no better."
        )
    count, first, last = len(records), SELECTING[0], SELECTING[-1]
    pair = sum(r["reached"]["value"] >= r["reached"]["query"] for r in records)
    by_beft = {n: [r["choices"][str(n)]["beft"] for r in records] for n in (first, last)}
    said.append(
        "- Of query and value, which the paper chooses between (the key is dead here), value is "
        f"no worse in {pair} of {count} cells; the BEFT score picks value in "
        f"{by_beft[last].count('value')} of {count}."
    )
    if by_beft[first] == by_beft[last]:
        said.append(f"- {first} steps give the BEFT score's pick of {last} steps.")
    said.append(
        "- The scores compare how far terms move in one common run, not what each could do alone."
    )
    return said


def _limits() -> list[str]:
    return [
        f"- Each term trained at one rate, {LR}, and from one training seed in a cell. Other rates",
        "  may suit other terms.",
        "- The validation rows that judge a pick also name the best term. So what is lost is not",
        "  cross-fitted: a part of it is the best term's luck.",
        "- Sentences are judged on 200 rows, SST-2 on 872, RTE on 277: an accuracy of 0.6 has a",
        "  standard error of 3.5, 1.7 and 2.9 points.",
        "- RTE learns nothing here: its terms differ by chance.",
        "- It is one encoder. No decoder is in the study.",
        "- The snr's picks are older than its floor of 1/N, which is the same for each term and",
        "  changes no order.",
    ]


def main() -> None:
    with whole_file(OUT) as temporary:
        temporary.write_text(page(results()), encoding="utf-8")


if __name__ == "__main__":
    main()
