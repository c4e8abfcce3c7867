"""What each way to choose a term picks in a cell of the study, and what that loses.

What a pick loses is cross-fitted. One half of a cell's validation rows names the best term and the
rate of each; the other half tells accuracies. Both ways round, the mean is taken. So the luck that
made a term look best is no part of what a pick loses, and a pick may even lose less than nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from rivals import RIVALS
from study import HALVES, Record
from study_prior import LARGE

from beft_ext.scores import SCORES
from beft_ext.selection import Choice, Gains
from beft_ext.selection.choice import PRIORS, Prior, weighed

SPREAD = PRIORS["encoder"].spread
Way = Callable[[Record], Sequence[str]]  # the term that is picked; of several, one by chance


def gains_of(record: Record) -> Gains:
    """A cell's gains; what a choice does not look at is left empty."""
    found, nothing = record["gain"], {"bands": {}, "steps": {}, "elements": {}, "curve": {}}
    more = {"ranking": list(found["values"]), "frontier": [], "dead": [], "folded": False}
    return Gains.of(nothing | more | found)


def prior_without(records: Sequence[Record], cell: Record) -> Prior:
    """Fitted to the large cells of the same model's other tasks; where there are none, that of
    models without a study."""
    above: dict[str, list[float]] = {}
    for r in records:
        if r["model"] == cell["model"] and r["task"] != cell["task"] and r["size"] >= LARGE:
            values = r["gain"]["values"]
            for term, value in values.items():
                above.setdefault(term, []).append(value - statistics.fmean(values.values()))
    means = {term: statistics.fmean(found) for term, found in above.items()}
    return Prior(means, SPREAD, "the other tasks") if means else PRIORS["other"]


def chosen(records: Sequence[Record], record: Record) -> Choice:
    """What auto picks, with a prior that never saw the task."""
    return weighed(gains_of(record), prior_without(records, record))


def folds(record: Record) -> Iterator[tuple[str, dict[str, float]]]:
    """The best term by one half of the validation rows, and what terms reach on the other."""
    for half in range(HALVES):
        naming = 1 - half
        rates = {
            term: max(own, key=lambda rate: own[rate][naming]["accuracy"])
            for term, own in record["reached"].items()
        }
        named = {t: record["reached"][t][rate][naming]["accuracy"] for t, rate in rates.items()}
        told = {t: record["reached"][t][rate][half]["accuracy"] for t, rate in rates.items()}
        yield max(named, key=named.__getitem__), told


def reached(record: Record) -> dict[str, float]:
    """Each term's accuracy, at the rate that the other half named."""
    found = [told for _, told in folds(record)]
    return {term: statistics.fmean(told[term] for told in found) for term in found[0]}


def lost(record: Record, terms: Sequence[str]) -> float:
    """Points of accuracy against the best term, cross-fitted."""
    return 100 * statistics.fmean(
        told[best] - statistics.fmean(told[t] for t in terms) for best, told in folds(record)
    )


def fixed_rule(records: Sequence[Record], record: Record) -> str:
    """The term that reaches most, on average, on the same model's other tasks."""
    others = [
        reached(r) for r in records if r["model"] == record["model"] and r["task"] != record["task"]
    ]
    if not others:
        return "value"
    return max(others[0], key=lambda t: statistics.fmean(found[t] for found in others))


def ways(records: Sequence[Record]) -> dict[str, Way]:
    """By name, what each way picks in a cell; none where it cannot."""
    picks: dict[str, Way] = {
        "gain": lambda r: [gains_of(r).best],
        "auto": lambda r: [chosen(records, r).term],
        "audition": lambda r: [r["audition"]["best"]],
        "best term of the other tasks": lambda r: [fixed_rule(records, r)],
        "always value": lambda _: ["value"],
        "always mlp_up": lambda _: ["mlp_up"],
        "chance": lambda r: list(r["reached"]),
    }
    rivals: dict[str, Way] = {name: _by_rival(name) for name in RIVALS}
    return picks | rivals | {name: _by_score(name) for name in SCORES}


def _by_rival(name: str) -> Way:
    return lambda r: [max(r["gain"]["rivals"][name], key=r["gain"]["rivals"][name].__getitem__)]


def _by_score(name: str) -> Way:
    return lambda r: list(r["scores"].get(name, {}))[:1]


def cost(record: Record, name: str) -> float | None:
    """Seconds that a way takes; None for what costs nothing."""
    if name in ("gain", "auto", *RIVALS):
        return float(record["gain"]["seconds"])
    if name == "audition":
        return float(record["gain"]["seconds"] + record["audition"]["seconds"])
    seconds = record["scores"].get("seconds") if name in SCORES else None
    return None if seconds is None else float(seconds)


def rank_correlation(found: Mapping[str, float], told: Mapping[str, float]) -> float:
    """Spearman's, over the terms of ``found``; equal values share their mean rank. 0 where all
    values are equal."""
    one, other = (_ranks([v[t] for t in found]) for v in (found, told))
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return statistics.correlation(one, other)


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(w < v for w in values) + sum(w == v for w in values) / 2 for v in values]


def by_size(records: Sequence[Record]) -> dict[int, list[Record]]:
    sizes = sorted({r["size"] for r in records})
    return {size: [r for r in records if r["size"] == size] for size in sizes}


def orders(record: Record) -> dict[str, dict[str, float]]:
    """The gains, what rivals say, and each score, by term."""
    scores = {m: found for m, found in record["scores"].items() if m in SCORES}
    return {"gain": record["gain"]["values"]} | record["gain"]["rivals"] | scores


def at_best_rate(record: Record) -> tuple[float, float]:
    """Accuracy of the term with the largest gain: at the raced rate, and at the best of the
    study's rates, which the other half of the rows names."""
    raced = statistics.fmean(half["accuracy"] for half in record["raced"]["reached"])
    return raced, reached(record)[record["raced"]["best"]]


def lost_at_one_rate(record: Record, terms: Sequence[str]) -> float:
    """Points of accuracy against the best term, where each trained at one rate and was judged once
    on all validation rows: a part of it is the best term's luck."""
    told = record["reached"]
    return 100 * (max(told.values()) - statistics.fmean(told[t] for t in terms))


def ways_at_one_rate(records: Sequence[Record]) -> dict[str, Way]:
    """Those of ``ways`` that the earlier cells have, by name."""
    every = ways(records)
    kept = ("gain", "auto", "always value", "always mlp_up", "chance")
    beft: dict[str, Way] = {"beft": lambda r: list(r["scores"]["beft"])[:1]}
    return {name: every[name] for name in kept} | beft
