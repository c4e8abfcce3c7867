"""The task head: what trains beside the biases."""

from __future__ import annotations

from torch import nn


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters outside the base model, the output embeddings left out."""
    base = getattr(model, "base_model", model)
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    inside = {id(p) for m in (base, embeddings) if m is not None for p in m.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]
