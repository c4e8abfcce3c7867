"""Writes docs/selection.md and its plot from what study.py and study_sure.py measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import study_fold
import study_sure
from rivals import RIVALS
from study import (
    CONTENDERS,
    DECODER,
    ENCODER,
    HALVES,
    MINILM,
    RESULTS,
    SELECTING,
    Plan,
    Record,
    finished,
    results,
)
from study_prior import LARGE
from study_ways import (
    at_best_rate,
    by_size,
    chosen,
    cost,
    folds,
    lost,
    lost_at_one_rate,
    orders,
    rank_correlation,
    reached,
    ways,
    ways_at_one_rate,
)

from beft_ext.files import whole_file
from beft_ext.scores import SCORES
from beft_ext.selection.gain_result import MARGIN, SURE

DOCS = Path(__file__).resolve().parents[1] / "docs"
OUT, PLOT = DOCS / "selection.md", DOCS / "selection.svg"
ONE_RATE = RESULTS.with_name("study-one-rate.jsonl")
WRONG = 1.0  # point of accuracy lost, or more


def page(records: Sequence[Record], draws: Sequence[Record]) -> str:
    lines = [
        "# Does the selection pick the right term?",
        "",
        f"Written by `benchmarks/study_page.py` from {len(records)} cells. In each, every living",
        "term trained alone, at each of a few rates; the last step's model is evaluated.",
        "",
        f"- Encoders, with a new head: {_plan(ENCODER)}.",
        f"- Decoders, by a prompt: {_plan(DECODER)}.",
        "",
        *(f"- {cell}" for cell in _cells(records)),
        "",
        "```",
        "python benchmarks/study.py sst2:100 sst2:300 rte:300 --data DIR",
        "python benchmarks/study.py sentences:100 sentences:300",
        "python benchmarks/study.py sst2:64 subj:64 --data DIR --model FOLDER --name NAME",
        "python benchmarks/study_sure.py sst2 subj trec --data DIR",
        "python benchmarks/study_fold.py --data DIR",
        "python benchmarks/study_page.py",
        "```",
        "",
        "![points lost by each way to pick, and gain against accuracy](selection.svg)",
        "",
    ]
    parts: dict[str, Callable[[], list[str]]] = {
        "What each way picks": lambda: _picks(records),
        "Is the rate right?": lambda: _raced(records),
        "Is it right about being sure?": lambda: _sureness(records, draws),
        "Does it stay where gradients are folded?": _folded,
        "Does it order the terms?": lambda: _orders(records),
        "What each term reaches": lambda: _terms(records),
        "Earlier, at one rate": _earlier,
        "What follows": lambda: _conclusion(records),
        "What this does not tell": lambda: _limits(records),
    }
    for head, told in parts.items():
        lines += [f"## {head}", "", *told(), ""]
    return "\n".join(lines[:-1]) + "\n"


def _plan(plan: Plan) -> str:
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    return (
        f"rates {rates}; {plan.steps} steps of {plan.size} examples or {plan.epochs} epochs, "
        f"whichever is more; {plan.most:,} validation rows at most"
    )


def _cells(records: Sequence[Record]) -> list[str]:
    """Draws of each model, task and size."""
    places = [(r["model"], r["task"], r["size"]) for r in records]
    return [
        f"{model}, {task}, {size} examples ({places.count((model, task, size))})"
        for model, task, size in dict.fromkeys(places)
    ]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _picks(records: Sequence[Record]) -> list[str]:
    sized = by_size(records)
    heads = [f"{size}: {head}" for size in sized for head in ("mean", "worst")]
    lines = [
        "What is lost against the best term, in points of accuracy, cross-fitted: one half of the",
        "validation rows names the best term and each term's rate, the other tells what is lost.",
        "'gain' takes the largest gain. 'auto' weighs the gains and a prior, fitted here to the",
        f"cells of the other tasks with {LARGE} examples and more. 'audition' races the",
        f"{CONTENDERS} terms with the largest gains at three rates each. 'best term of the other",
        "tasks' is the best fixed rule that never saw the task. 'chance' is the mean over all",
        f"terms. The scores are those of `select` after {SELECTING} steps. Seconds are medians, on",
        "one thread of a busy machine.",
        "",
        _row("picked by", "seconds", *heads, "all: mean", "picks"),
        _row(*["---"] * (4 + len(heads))),
    ]
    for name, way in ways(records).items():
        cells: list[str] = []
        for own in (*sized.values(), records):
            losses = [lost(r, way(r)) for r in own if way(r)]
            mean, worst = (f"{of(losses):.1f}" if losses else "-" for of in (statistics.fmean, max))
            cells += [mean] if own is records else [mean, worst]
        spent = [s for r in records if (s := cost(r, name)) is not None]
        seconds = f"{statistics.median(spent):.0f}" if spent else "none"
        picks = sorted({term for r in records for term in way(r)})
        shown = "all" if name == "chance" else ", ".join(picks)
        lines.append(_row(name, seconds, *cells, shown))
    return lines


def _raced(records: Sequence[Record]) -> list[str]:
    lines = [
        "`--lr auto` against the best of the rates, named on the other half of the validation",
        "rows, for the term with the largest gain; mean accuracy.",
        "",
        _row("examples", "raced rate", "best of the rates", "lost, points", "raced rates"),
        _row(*["---"] * 5),
    ]
    for size, own in by_size(records).items():
        pairs = [at_best_rate(r) for r in own]
        raced, best = (statistics.fmean(p[i] for p in pairs) for i in (0, 1))
        rates = sorted({r["raced"]["rate"] for r in own})
        told = f"{rates[0]:.2g} to {rates[-1]:.2g}"
        lines.append(_row(size, f"{raced:.3f}", f"{best:.3f}", f"{100 * (best - raced):.1f}", told))
    return lines


def _sureness(records: Sequence[Record], draws: Sequence[Record]) -> list[str]:
    lines = [
        f"A pick is sure where the probability that no rival explains {MARGIN} more is at least",
        f"{SURE}. In the cells, where the accuracy that was reached tells whether 'auto' was wrong",
        f"({WRONG:.0f} point lost or more):",
        "",
        _row("examples", "sure", "wrong when sure", "wrong when not sure", "sure and wrong in"),
        _row(*["---"] * 5),
    ]
    for size, own in by_size(records).items():
        wrong: dict[bool, list[bool]] = {True: [], False: []}
        where = []
        for r in own:
            choice = chosen(records, r)
            wrong[choice.sure].append(lost(r, [choice.term]) >= WRONG)
            where += [r["task"]] if choice.sure and wrong[True][-1] else []
        shown = [f"{sum(wrong[sure])} of {len(wrong[sure])}" for sure in (True, False)]
        sure = f"{len(wrong[True])} of {len(own)}"
        lines.append(_row(size, sure, *shown, ", ".join(where) or "none"))
    if draws:
        lines += [
            "",
            "In draws from a pool of rows, where the mean gain over disjoint draws is the",
            "truth. 'covered' is how often the true lead of a term over another lies within 1.96",
            "times the error that is told, nominally 0.95; 'of firsts' is the same of the first",
            "term over its rivals, which is first by luck as well.",
            "",
            _row(
                "task",
                "pool",
                "examples",
                "draws",
                "sure",
                "wrong when sure",
                "covered",
                "of firsts",
            ),
            _row(*["---"] * 8),
        ]
    for d in draws:
        wrong_ones = f"{d['wrong']} ({d['wrong'] / max(1, d['sure']):.3f})"
        told = (f"{d['covered']:.3f}", f"{d['covered_firsts']:.3f}")
        pool = d.get("pool", study_sure.POOL)
        lines.append(_row(d["task"], pool, d["size"], d["draws"], d["sure"], wrong_ones, *told))
    return lines


def _folded() -> list[str]:
    lines = [
        "Where the gradients do not fit the memory, they are kept in fewer bits, and where that is",
        "not enough, folded. Of the same rows of each cell, told with a part of the memory that",
        "whole gradients take: how far the gain of a term moves at most, and the largest lead of a",
        "term over another that changes its sign.",
        "",
        _row(
            "memory",
            "kept as",
            "cells",
            "moves, median cell",
            "worst cell",
            "lead that is lost, worst cell",
        ),
        _row(*["---"] * 6),
    ]
    for part, kind in study_fold.PARTS.items():
        own = [line for line in study_fold.results() if line["part"] == part]
        if own:
            moves = [study_fold.moved(line) for line in own]
            swapped = max(map(study_fold.reordered, own))
            told = (statistics.median(moves), max(moves), swapped)
            lines.append(_row(f"1/{part}", kind, len(own), *(f"{x:.3f}" for x in told)))
    return lines


def _orders(records: Sequence[Record]) -> list[str]:
    sized = by_size(records)
    lines = [
        "Rank correlation (Spearman's) with the accuracy that the terms reach: mean over the",
        "cells.",
        "",
        _row("", *(f"{size} examples" for size in sized)),
        _row(*["---"] * (1 + len(sized))),
    ]
    for name in ("gain", *RIVALS, *SCORES):
        cells = []
        for own in sized.values():
            told = [(orders(r)[name], reached(r)) for r in own if orders(r).get(name)]
            cells.append(
                f"{statistics.fmean(rank_correlation(*pair) for pair in told):.2f}" if told else "-"
            )
        lines.append(_row(name, *cells))
    return lines


def _terms(records: Sequence[Record]) -> list[str]:
    models = list(dict.fromkeys(r["model"] for r in records))
    lines = [_row("model", "term", "mean accuracy", "named best in"), _row(*["---"] * 4)]
    for model in models:
        own = [r for r in records if r["model"] == model]
        found = [reached(r) for r in own]
        named = [best for r in own for best, _ in folds(r)]
        means = {t: statistics.fmean(f[t] for f in found) for t in found[0]}
        for term, mean in sorted(means.items(), key=lambda item: -item[1]):
            share = f"{named.count(term) / HALVES:g} of {len(own)}"
            lines.append(_row(model, term, f"{mean:.3f}", share))
    return lines


def _earlier() -> list[str]:
    """Of the cells that are measured in the older way."""
    records = [{"model": MINILM, **r} for r in results(ONE_RATE)]
    sized = by_size(records)
    lines = [
        f"{len(records)} cells of MiniLM on {', '.join(sorted({r['task'] for r in records}))}, of",
        "more draws: each term trained once, at the rate 0.01, and was judged on all validation",
        "rows, which also named the best term. Mean points lost:",
        "",
        _row("picked by", *(f"{size} examples ({len(own)} cells)" for size, own in sized.items())),
        _row(*["---"] * (1 + len(sized))),
    ]
    for name, way in ways_at_one_rate(records).items():
        means = (statistics.fmean(lost_at_one_rate(r, way(r)) for r in o) for o in sized.values())
        lines.append(_row(name, *(f"{mean:.1f}" for mean in means)))
    return lines


def _conclusion(records: Sequence[Record]) -> list[str]:
    """In words that hold for the figures above, or not at all."""
    picks, said = ways(records), []
    names = ("auto", "gain", "audition", "best term of the other tasks", "beft")
    for size, own in (*by_size(records).items(), ("all", records)):
        told = []
        for name in names:
            losses = [lost(r, picks[name](r)) for r in own if picks[name](r)]
            if losses:
                told.append(f"{name} {statistics.fmean(losses):.1f}")
        where = "Over all cells" if size == "all" else f"With {size} examples"
        said.append(f"- {where}, points lost: {', '.join(told)}.")
    encoders = [r for r in records if r["scores"].get("beft")]
    by_beft = [picks["beft"](r)[0] for r in encoders]
    pair = sum(reached(r)["value"] >= reached(r)["query"] for r in encoders)
    said.append(
        f"- The BEFT score picks value in {by_beft.count('value')} of {len(by_beft)} cells. Of "
        f"query and value, which the paper chooses between, value is no worse in {pair}."
    )
    said.append(
        "- The scores compare how far terms move in one common run, not what each could do alone."
    )
    return said


def _limits(records: Sequence[Record]) -> list[str]:
    draws = max(r["draw"] for r in records) + 1
    return [
        f"- Each term trained from one seed in a cell, and there are {draws} draws at most.",
        "- A term's rate is named on validation rows, those that do not tell what is lost.",
        "- Half of sentences' validation rows are 100, of SST-2's 436, of Subj's 500, of TREC's",
        "  250, of RTE's 138: an accuracy of 0.8 has a standard error of 4.0, 1.9, 1.8, 2.5 and",
        f"  3.4 points. Of a decoder's they are {DECODER.most // HALVES}.",
        "- RTE learns next to nothing here: its terms differ by chance.",
        *(
            ["- It is one encoder. No decoder is in the study."]
            if len({r["model"] for r in records}) == 1
            else ["- It is one encoder and one decoder. No encoder-decoder is in the study."]
        ),
    ]


def draw(records: Sequence[Record]) -> None:
    """The plot: what each way loses, and gain against accuracy. The same bytes each time."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "beft", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_lost(left, records)
        _draw_reached(right, records)
        with whole_file(PLOT) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _draw_lost(axes: Any, records: Sequence[Record]) -> None:
    sized, names = by_size(records), [n for n in ways(records) if n != "always mlp_up"]
    for number, (size, own) in enumerate(sized.items()):
        places = [i + 0.8 * (number - (len(sized) - 1) / 2) / len(sized) for i in range(len(names))]
        losses = [[lost(r, w) for r in own if (w := ways(records)[n](r))] for n in names]
        means = [statistics.fmean(found) if found else 0.0 for found in losses]
        axes.barh(places, means, height=0.8 / len(sized), label=f"{size} examples")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend()
    axes.set(xlabel="points of accuracy lost against the best term", title="Which term to train?")


def _draw_reached(axes: Any, records: Sequence[Record]) -> None:
    """Both against the mean over the cell's terms, so that tasks can be laid over each other."""
    large = [r for r in records if r["size"] >= LARGE]
    points: dict[str, list[tuple[float, float]]] = {}
    for r in large:
        values, told = r["gain"]["values"], reached(r)
        middle = statistics.fmean(values.values()), statistics.fmean(told.values())
        for term, value in values.items():
            pair = value - middle[0], 100 * (told[term] - middle[1])
            points.setdefault(term, []).append(pair)
    for term, found in sorted(points.items()):
        axes.plot(*zip(*found, strict=True), "o", markersize=4, label=term)
    axes.axhline(0, color="gray", linewidth=0.5)
    axes.axvline(0, color="gray", linewidth=0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(
        xlabel="gain before training, above the terms' mean",
        ylabel="points of accuracy after it, above the mean",
        title=f"Does the gain foretell? ({LARGE} examples and more)",
    )


def main() -> None:
    found = finished()
    with whole_file(OUT) as temporary:
        temporary.write_text(page(found, study_sure.results()), encoding="utf-8")
    draw(found)


if __name__ == "__main__":
    main()
