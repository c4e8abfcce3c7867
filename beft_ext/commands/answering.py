"""A model that is to answer, from a folder alone or with an adapter, and what its answers mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from beft_ext.commands.loading import ModelSpec, pretrained, require_order
from beft_ext.commands.sources import Source
from beft_ext.models import class_names_of
from beft_ext.tasks import Objective, task_of


def answering(
    source: Source, spec: ModelSpec, adapter: Path | None
) -> tuple[Source, nn.Module, Objective]:
    """The source with the classes that the model was trained for, the model, and how it is asked.

    The classes are the adapter's or the folder's own, whatever rows are at hand. What the columns
    mean is the adapter's too, where nothing else is said.

    Raises: WorkflowError, AdapterError or DataError; also for a model with a head that neither
        the folder nor an adapter has trained.
    """
    from beft_ext.adapters import adapter_facts, class_names, head_classes, load_adapter

    if adapter is None:
        source = replace(source, classes=class_names_of(pretrained(spec.model, "AutoConfig")))
        return source, *spec.load(source.task, classes=None, trained=True)
    names, record = class_names(adapter), adapter_facts(adapter).get("task")
    kept = None if record is None else task_of(record, f"adapter '{adapter}'")
    source = replace(source, kept=kept, classes=names)
    require_order(f"adapter '{adapter}'", names, source.described.classes)
    outputs = head_classes(adapter)
    spec = replace(spec, new_head=spec.new_head or outputs is not None)
    model, objective = spec.load(source.task, outputs, trained=outputs is None)
    load_adapter(model, adapter)
    return source, model, objective
