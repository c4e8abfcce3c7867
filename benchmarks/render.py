"""README.md, pages of docs/ and the plots from benchmarks/results/; a test checks them.

``python benchmarks/render.py`` after a benchmark rewrites all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import plots
import tables
from harness import ROOT
from rungs import page

from beft_ext.commands.comparison import Outcome, summarize, table
from beft_ext.files import whole_file

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
HEAD = """# Benchmarks

Every row of every result in `benchmarks/results/`, written by `benchmarks/render.py`. Medians,
with quartiles in brackets, of cases that ran in turn; peak memory is beyond the model. A peer
that is not installed or fails is shown as missing, with the reason.
"""


def summary(root: Path = ROOT) -> str:
    """The README's part."""
    return tables.key_rows(root)


def compared(root: Path = ROOT) -> str:
    """What ``beft-ext compare`` found: the runs of a comparison are a file of results/compare."""
    lines = ["## What does each adaptation method reach?"]
    for path in sorted((root / "benchmarks" / "results" / "compare").glob("*.jsonl")):
        runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        setups = [run.pop("setup") for run in runs]
        setup = setups[0]
        metrics = list(runs[0]["metrics"])
        said = (
            f"{setup['model']}, {setup['task']}, {setup['train_size']} training rows. Other rows "
        )
        said += (
            f"chose among {setup['epochs']} epochs, and others again judge, which no choice saw."
        )
        lines += [said, table(summarize([Outcome(**run) for run in runs], metrics), metrics)]
    return "\n\n".join(lines)


def document(root: Path = ROOT) -> str:
    drawn = [path for path, _ in tables.records(root) if path.stem in plots.PLOTS]
    images = [f"![{path.stem}, {path.parent.name}]({plots.name(path)})" for path in drawn]
    return (
        "\n\n".join([HEAD.rstrip(), *images])
        + "\n"
        + tables.whole(root)
        + f"\n\n{compared(root)}\n"
    )


def rendered(readme: str, content: str) -> str:
    """``readme`` with ``content`` between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def kernels(text: str, root: Path = ROOT) -> str:
    """docs/kernels.md with its figures between their marks."""
    found = {p.parent.name: record for p, record in tables.records(root) if p.stem == "rungs"}
    return page.filled(text, found)


def write(root: Path = ROOT) -> None:
    for path, record in tables.records(root):
        if path.stem in plots.PLOTS:
            plots.draw(path, record, root / "docs")
    readme, climb = root / "README.md", root / "docs" / "kernels.md"
    for path, content in (
        (readme, rendered(readme.read_text(encoding="utf-8"), summary(root))),
        (root / "docs" / "benchmarks.md", document(root)),
        (climb, kernels(climb.read_text(encoding="utf-8"), root)),
    ):
        with whole_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write()
