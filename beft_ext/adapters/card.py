"""The adapter's README.md: what it changes, how to load it, why this term was chosen."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from beft_ext.selection import Audition, Selection, read_selection


def model_card(
    model: nn.Module,
    what: str,
    reason: str | None,
    selection: Selection | str | Path | None = None,
    audition: Audition | None = None,
) -> str:
    """Markdown with the hub's metadata.

    Args:
        what: the summary of what was trained.
        reason: why PEFT cannot load the adapter, or None.
        selection: the run's result or its ``selection.json``.
        audition: the race that the term or its rate won.
    Raises:
        SelectionError: that file is not one that ``Selection.save`` wrote.
    """
    kind = type(model).__name__
    base = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    head = ["library_name: peft", "tags:", "- beft", "- bias-tuning"]
    if base:
        head.insert(0, f"base_model: {json.dumps(base)}")
    place = json.dumps(base or "path/to/base")
    lines = ["---", *head, "---", "", f"# Bias adapter for {kind}", ""]
    lines += ["Biases trained with beft_ext (BEFT, arXiv 2509.15974):", "", _code(what)]
    lines += ["", "## Use", ""]
    plain = (
        f"from transformers import {kind}\nimport beft_ext\n\n"
        f"model = {kind}.from_pretrained({place})\n"
        'beft_ext.load_adapter(model, "path/to/this/folder")'
    )
    lines += [_code(plain, "python"), ""]
    if reason is None:
        peft = 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, "...")'
        lines += ["or with PEFT 0.21 or later:", "", _code(peft, "python")]
    else:
        lines += [f"It does not load in PEFT: {reason}."]
    if selection is not None:
        if not isinstance(selection, Selection):
            selection = read_selection(Path(selection))
        lines += ["", "## Selection", "", f"Ranked by '{selection.method}':", ""]
        lines += [_code(str(selection))]
    if audition is not None:
        lines += ["", "## Audition", "", "Raced by the loss on training rows held out:", ""]
        lines += [_code(str(audition))]
    return "\n".join(lines) + "\n"


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"
