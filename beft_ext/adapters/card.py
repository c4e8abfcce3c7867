"""The adapter's README.md: how to load it, what it changes, what it reached, why this term."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from beft_ext.adapters.contents import Contents, class_facts, task_type
from beft_ext.adapters.hub import names_repository
from beft_ext.models.wrappers import class_of
from beft_ext.selection import Audition, Selection, read_selection

PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
}
MOST_NAMES = 12  # classes that the code names one by one
HERE = "."


def model_card(
    model: nn.Module,
    contents: Contents,
    what: str,
    reason: str | None,
    *,
    place: str | None = None,
    selection: Selection | str | Path | None = None,
    audition: Audition | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with the hub's metadata.

    Args:
        contents: what the adapter changes.
        what: the summary of what was trained.
        reason: why PEFT cannot load the adapter, or None.
        place: "user/name" on the hub; None for the folder that the card lies in.
        selection: the run's result or its ``selection.json``.
        audition: the race that the term or its rate won.
        about: of which ``data``, in words, and ``evaluation`` are shown, as ``save_adapter`` says.
    Raises:
        SelectionError: that file is not one that ``Selection.save`` wrote.
    """
    names = class_facts(model).get("classes")
    kind = class_of(model).__name__
    lines = [*_metadata(model, reason), "", f"# Bias adapter for {kind}", ""]
    lines += ["Biases trained with beft_ext (BEFT, arXiv 2509.15974):", "", _code(what), ""]
    lines += [f"Classes: {', '.join(names)}.", ""] if names else []
    lines += _use(model, contents, reason, place)
    about = about or {}
    if "data" in about:
        lines += ["", "## Data", "", str(about["data"])]
    if "evaluation" in about:
        lines += ["", "## Evaluation", "", *_evaluation(about["evaluation"])]
    if selection is not None:
        if not isinstance(selection, Selection):
            selection = read_selection(Path(selection))
        lines += ["", "## Selection", "", f"Ranked by '{selection.method}':", ""]
        lines += [_code(str(selection))]
    if audition is not None:
        lines += ["", "## Audition", "", "Raced by the loss on training rows held out:", ""]
        lines += [_code(str(audition))]
    return "\n".join(lines) + "\n"


def _metadata(model: nn.Module, reason: str | None) -> list[str]:
    base, pipeline = _base(model), PIPELINES.get(task_type(model) or "")
    lines = ["---"]
    if base and names_repository(base) and not Path(base).exists():  # the hub refuses a path
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    lines += ["library_name: peft"] if reason is None else []
    lines += [f"pipeline_tag: {pipeline}"] if pipeline else []
    return [*lines, "tags:", "- beft", "- bias-tuning", "---"]


def _use(model: nn.Module, contents: Contents, reason: str | None, place: str | None) -> list[str]:
    where = json.dumps(place or HERE)
    base = _loading(model, contents)
    ours = f"import beft_ext\n{base}\nmodel = beft_ext.load_adapter(model, {where})"
    lines = ["## Use", "", _code(ours, "python"), ""]
    lines += [] if place else ["`.` is the folder that holds the adapter.", ""]
    if reason is not None:
        return [*lines, f"It does not load in PEFT: {reason}."]
    peft = f"from peft import PeftModel\n{base}\nmodel = PeftModel.from_pretrained(model, {where})"
    return [*lines, "or with PEFT 0.21 or later:", "", _code(peft, "python")]


def _loading(model: nn.Module, contents: Contents) -> str:
    """Code that loads the base model, with a head of the adapter's classes."""
    kind, base = class_of(model), _base(model) or "path/to/base"
    home = "transformers" if hasattr(transformers, kind.__name__) else kind.__module__
    options, note = [json.dumps(base)], ""
    config = getattr(model, "config", None)
    if contents.head and "Classification" in kind.__name__:
        names, count = class_facts(model).get("classes", []), getattr(config, "num_labels", 2)
        some = 0 < len(names) <= MOST_NAMES
        options.append(f"id2label={dict(enumerate(names))}" if some else f"num_labels={count}")
        options.append("ignore_mismatched_sizes=True")
        note = "  # the adapter brings the head"
    changed = config.to_diff_dict() if isinstance(config, transformers.PreTrainedConfig) else {}
    if isinstance(padding := changed.get("pad_token_id"), int):
        options.append(f"pad_token_id={padding}")
    arguments = "".join(f"    {option},\n" for option in options)
    call = f"model = {kind.__name__}.from_pretrained(\n{arguments}){note}"
    if len(options) == 1:
        call = f"model = {kind.__name__}.from_pretrained({options[0]})"
    return f"from {home} import {kind.__name__}\n\n{call}"


def _evaluation(found: Mapping[str, Any]) -> list[str]:
    """A table: metrics before training, of the majority, and after it or of the best epoch."""
    best = {"best on validation": found["best_on_validation"]}
    columns = {"before training": found["before"]}
    if majority := found.get("majority"):
        columns[f"always '{majority['class']}'"] = majority
    columns |= best if found["after"] is None else {"after training": found["after"]}
    names = list(found["before"])
    rows = f"{found['examples']} {found['rows']} rows"
    told = "which chose the epoch" if found["after"] is None else "which no choice has seen"
    lines = [
        f"On {rows}, {told}:",
        "",
        f"| | {' | '.join(names)} |",
        f"|{' --- |' * (len(names) + 1)}",
    ]
    for column, values in columns.items():
        lines.append(f"| {column} | {' | '.join(f'{values[n]:.4f}' for n in names)} |")
    return lines


def _base(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"
