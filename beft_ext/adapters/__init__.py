"""Adapters: the trained biases and head as files, on a model by name, and merged for good."""

from beft_ext.adapters.applying import delete_adapter, load_adapter, set_adapter
from beft_ext.adapters.contents import AdapterError
from beft_ext.adapters.facts import TermFacts, facts_table, term_facts
from beft_ext.adapters.merging import merge_adapter, unmerge_adapter
from beft_ext.adapters.reading import adapter_facts, class_names, head_classes, model_class
from beft_ext.adapters.saving import save_adapter

__all__ = [
    "AdapterError",
    "TermFacts",
    "adapter_facts",
    "class_names",
    "delete_adapter",
    "facts_table",
    "head_classes",
    "load_adapter",
    "merge_adapter",
    "model_class",
    "save_adapter",
    "set_adapter",
    "term_facts",
    "unmerge_adapter",
]
