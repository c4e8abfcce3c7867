"""Writes docs/paper.md and the heatmaps' pictures from benchmarks/results/paper/.

``python benchmarks/paper/render.py`` after runs; a test checks that the page is that of the files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import store
from cells import HEATMAPS, TABLES, TITLES, Cell, Figure, cells

from beft_ext.files import whole_file

DOCS = Path(__file__).resolve().parents[2] / "docs"
NOTHING = "-"
HEAD = """# The paper's tables

Written by `benchmarks/paper/render.py` from the runs in `benchmarks/results/paper/`. Each table of
Huang et al. 2025 (arXiv 2509.15974) is one command, with the hyperparameters of the authors'
public scripts; what has been run is not run again:

```
python benchmarks/paper/run.py --table 1          # also 2, 3, 4, 5, 6, heatmaps
python benchmarks/paper/run.py --table 1 --model minilm --data DIR --epochs 4 --seeds 3
python benchmarks/paper/decoder.py --out out/paper/decoder       # a stand-in for tables 5 and 6
python benchmarks/paper/render.py
```

`paper`: the published figure, in percent, with its source. "figure": read off the published
figure of BERT-base by data regime, to 0.1. "notebook": the tutorial notebook in the authors'
repository, the best of 16 epochs with seed 0; for MRPC an older state of it. "second hand": quoted
from Table 2 by another source. None is guessed. `here`: mean and standard deviation over seeds of
the task's metric, in percent, at the best epoch. A stand-in is a smaller model in the place of the
paper's: its figures tell whether the order of methods is the paper's, not whether the figures are.
Cells with neither figure are counted below each table.

In the published figure the BEFT score ranks value, query and key 1st, 6th and 8th of eight terms on
SST-2, 1st, 4th and 8th on CoLA, 1st, 5th and 8th on STS-B. The key's figures are what the head
alone reaches, for that bias is dead in BERT ([definitions.md](definitions.md)).

Hugging Face PEFT's own benchmark of its BEFT tuner (Llama-3.2-3B, MetaMathQA, rate 1e-4) is a case
of much data: the value bias reaches 32 % with 28,672 parameters, LoRA of rank 32 reaches 48 % with
9.2 million, full training 47 %.

What differs from the authors' code in every run: the pooler's bias is not trained beside the head,
texts are padded to the longest of their batch, decoders run in fp32 and are evaluated after each
epoch, not after the last alone, prefixes do not start from real activations, and the 32 examples
in a prompt are the same for all questions of one seed. MiniLM's runs are on GLUE's SST-2 (training
rows drawn from the first 6,000) and RTE; seconds are of a machine that had other work as well.
"""
NOTES = {
    "1": """Batches of 16, AdamW at a constant rate, clipped to 1, texts cut at 128 tokens. The
scripts hold epochs of the larger encoders for SST-2 and RTE alone.""",
    "2": """`random-mask` trains 100,000 scattered parameters; the scripts give it no rate, so that
of the biases is taken. Peak memory is of one step beyond the model.""",
    "3": """The scripts hold no number of rows for CB and WiC: all of the training split. CB is
measured by macro F1, as there.""",
    "4": """`low-rank` is what the authors' code injects: a change of the bias that is a matrix of
rank 8 read row by row. `lora` is LoRA of that projection's weight, for comparison, not in the
paper.""",
    "5": """Batches of 8, AdamW, the rate falling to zero, options ranked by their likelihood, up
to 1,000 validation rows. The paper's BEFT is `value`; the scripts run query and key too. The small
decoders of 800 steps learnt copa and answer the rest near chance: their rows show that the command
works, not an order of methods.""",
    "6": """As Table 5, the stand-in too; the value bias is added, zero at first. `zero-shot` is for
comparison, not in the paper.""",
    HEATMAPS: """All biases trained together on low-data SST-2; Fisher information of the untrained
weights in batches of 8, as the authors' scripts take it.""",
}
EXTRA = {"seconds": 1.0, "peak MiB": 2.0**20, "kept KiB": 2.0**10}  # of table 2, with their units


@dataclass(frozen=True)
class Row:
    """A line of a table: one method, or all that have nothing to tell them apart."""

    methods: tuple[str, ...]
    setting: str
    paper: tuple[Figure | None, ...]  # of each method
    here: str
    seeds: str
    trained: str
    extra: tuple[str, ...]
    note: str

    def like(self, other: Row) -> bool:
        mine, its = asdict(self), asdict(other)
        return all(mine[k] == its[k] for k in mine if k not in ("methods", "paper"))


def page(results: Mapping[str, Sequence[store.Record]]) -> str:
    """The whole page. results: the records of each table."""
    parts = [HEAD]
    for table in TABLES:
        number = "Heatmaps" if table == HEATMAPS else f"Table {table}"
        body = _heatmaps(results[table]) if table == HEATMAPS else _table(table, results[table])
        parts.append(f"## {number}: {TITLES[table]}\n\n{NOTES[table]}\n\n{body}\n")
    return "\n".join(parts)


def _table(table: str, records: Sequence[store.Record]) -> str:
    heads = ["model", "task", "method", "authors' run", "paper", "here", "seeds", "trained"]
    heads += [*(EXTRA if table == "2" else ()), "what differs, or why there is no figure"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    missing = 0
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells(table):
        groups.setdefault((cell.model, cell.task, cell.regime), []).append(cell)
    for (model, task, regime), own in groups.items():
        there = [
            r for r in records if (r["model"], r["task"], r["regime"]) == (model, task, regime)
        ]
        rows = [r for cell in own for r in _rows(cell, there)]
        told = [r for r in rows if r.here != NOTHING or r.paper != (None,)]
        missing += len(rows) - len(told)
        for row in _merged(told):
            shown = [model.split("/")[-1], f"{task}, {regime}", ", ".join(row.methods)]
            shown += [row.setting, _published(row.paper), row.here, row.seeds, row.trained]
            shown += [*(row.extra if table == "2" else ()), row.note]
            lines.append(f"| {' | '.join(shown)} |")
    if missing == len(cells(table)):
        lines = []
    if missing:
        lines += ["", f"Cells with neither figure, for their models cannot be had here: {missing}."]
    compared = _compared(records)
    return "\n".join([*lines, *(["", compared] if compared else [])]).strip()


def _rows(cell: Cell, there: Sequence[store.Record]) -> Iterator[Row]:
    """A row for each way in which a cell was run, or one that says why there is none."""
    hyper = cell.hyper
    known = "all" if hyper.rows is None else f"{hyper.rows:,}"
    rate = "" if hyper.lr is None else f", {hyper.epochs} epochs, rate {hyper.lr:g}"
    setting = f"{known} rows{rate}"
    paper = (cell.figure,)
    own = [r for r in there if r["method"] == cell.method]
    nothing = (NOTHING,) * len(EXTRA)
    for told in dict.fromkeys(_difference(r) for r in own):
        alike = [r for r in own if _difference(r) == told]
        runs = [r for r in alike if r["metrics"]]
        failed = next((r for r in alike if r["failure"]), None)
        if runs:
            trained = f"{statistics.median(r['parameters'] for r in runs):,.0f}"
            numbers = _here(cell, runs), str(len(runs)), trained, _extra(runs)
            yield Row((cell.method,), setting, paper, *numbers, told)
        elif failed:
            note = "; ".join(filter(None, (told, failed["failure"])))
            yield Row((cell.method,), setting, paper, NOTHING, NOTHING, NOTHING, nothing, note)
    if not own:
        why = "not run: the model cannot be had here"
        yield Row((cell.method,), setting, paper, NOTHING, NOTHING, NOTHING, nothing, why)


def _published(figures: Sequence[Figure | None]) -> str:
    known = [f for f in figures if f is not None]
    if not known:
        return NOTHING
    spreads = ("" if f.spread is None else f" ± {f.spread:.2f}" for f in known)
    values = ", ".join(f"{f.value:g}{s}" for f, s in zip(known, spreads, strict=True))
    return f"{values} ({known[0].source})"


def _merged(rows: Sequence[Row]) -> list[Row]:
    """Neighbours without a figure that differ in nothing but the method, as one row."""
    merged: list[Row] = []
    for row in rows:
        if merged and row.here == NOTHING and merged[-1].like(row):
            last = merged.pop()
            both = {"methods": last.methods + row.methods, "paper": last.paper + row.paper}
            row = replace(row, **both)
        merged.append(row)
    return merged


def _here(cell: Cell, runs: Sequence[store.Record]) -> str:
    values = [100 * r["metrics"][cell.metric] for r in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _extra(runs: Sequence[store.Record]) -> tuple[str, ...]:
    found = []
    for name, unit in EXTRA.items():
        values = [v for r in runs if (v := r[name.split()[0]]) is not None]
        found.append(f"{statistics.median(values) / unit:,.1f}" if values else NOTHING)
    return tuple(found)


def _difference(record: store.Record) -> str:
    """In what a run is not the authors'."""
    words = {"rows": "training rows", "evaluated": "validation rows", "lr": "rate"}
    said = [f"**{record['stand_in']} in place of the model**"] if record["stand_in"] else []
    for name, theirs in record["authors"].items():
        ours, name = record["hyper"][name], words.get(name, name)
        ours = f"rate {ours:g}" if name == "rate" else f"{ours:,} {name}"
        theirs = "all" if theirs is None else f"{theirs:,g}"
        said.append(f"{ours} in place of {theirs}")
    if record["ran"] != record["method"]:
        dead = ": softmax ignores this model's key bias" * ("key" in record["method"])
        said.append(f"run as {record['ran']}{dead}")
    if record["data"]:
        said.append("generated data")
    return "; ".join(said)


def _compared(records: Sequence[store.Record]) -> str:
    """How often the value bias was no worse than the query bias, seed by seed."""
    reached: dict[tuple[Any, ...], dict[str, float]] = {}
    for r in records:
        if r["metrics"] and r["method"] in ("value", "query"):
            place = (r["model"], r["task"], r["regime"], _difference(r), r["seed"])
            reached.setdefault(place, {})[r["method"]] = next(iter(r["metrics"].values()))
    pairs = [p for p in reached.values() if len(p) == 2]
    fine = sum(p["value"] >= p["query"] for p in pairs)
    told = f"Trained alone, value is no worse than query in {fine} of {len(pairs)} pairs of runs."
    return told if pairs else ""


def _heatmaps(records: Sequence[store.Record]) -> str:
    parts = []
    for record in records:
        name = record["stand_in"] or record["model"].split("/")[-1]
        if record["failure"]:
            parts.append(f"{name}, {record['task']}: {record['failure']}")
            continue
        told = "; ".join(filter(None, (_difference(record), f"dead: {', '.join(record['dead'])}")))
        parts.append(f"{name}, {record['task']}, seed {record['seed']}. {told}.")
        for score, rows in record["per_layer"].items():
            parts.append(f"![{score} by term and layer]({_picture(name, score)})")
            parts.append(_numbers(score, rows))
    return "\n\n".join(parts or ["Not run."])


def _numbers(score: str, rows: Mapping[str, Sequence[float | None]]) -> str:
    layers = max(map(len, rows.values()))
    lines = [f"| {score} | {' | '.join(f'layer {i}' for i in range(layers))} | mean |"]
    lines.append(f"|{' --- |' * (layers + 2)}")
    for term, row in rows.items():
        known = [x for x in row if x is not None]
        mean = statistics.fmean(known) if known else None
        cells_of = (NOTHING if x is None else f"{x:.1e}" for x in (*row, mean))
        lines.append(f"| {term} | {' | '.join(cells_of)} |")
    return "\n".join(lines)


def _picture(name: str, score: str) -> str:
    return f"paper-heatmap-{name.replace(' ', '-')}-{score}.png"


def _draw(records: Sequence[store.Record]) -> None:
    from beft_ext.plots import heatmap

    for record in records:
        for score, rows in record.get("per_layer", {}).items():
            numbers = {t: [math.nan if x is None else x for x in row] for t, row in rows.items()}
            name = record["stand_in"] or record["model"].split("/")[-1]
            title = f"{name}, {record['task']}: {score}"
            with whole_file(DOCS / _picture(name, score)) as temporary:
                heatmap(numbers, title, temporary, score=score, dead=record["dead"])


def main() -> None:
    results = {table: store.read(table) for table in TABLES}
    with whole_file(DOCS / "paper.md") as temporary:
        temporary.write_text(page(results), encoding="utf-8")
    _draw(results[HEATMAPS])


if __name__ == "__main__":
    main()
