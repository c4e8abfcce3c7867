"""The task head: what trains beside the biases, and what its outputs are called."""

from __future__ import annotations

from torch import nn

from beft_ext.models.bias_map import BiasError
from beft_ext.models.find import is_quantised
from beft_ext.models.wrappers import inside


def class_names_of(config: object) -> tuple[str, ...]:
    """Names of a head's outputs, where they say more than their numbers; else none."""
    found = getattr(config, "id2label", None) or {}
    if all(name == f"LABEL_{i}" for i, name in found.items()):
        return ()
    return tuple(str(name) for name in found.values())


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters outside the base model, the output embeddings left out.

    Raises BiasError for a quantised head, which cannot train.
    """
    base, embeddings = getattr(model, "base_model", model), output_layer(model)
    inside = {id(p) for m in (base, embeddings) if m is not None for p in m.parameters()}
    head = {n: p for n, p in model.named_parameters() if id(p) not in inside}
    for name, parameter in head.items():
        if is_quantised(parameter):
            raise BiasError(
                f"the head's '{name}' is quantised ({type(parameter).__name__}) and cannot train: "
                "quantise model.base_model alone"
            )
    return list(head.values())


def unsharded(model: nn.Module) -> set[nn.Parameter]:
    """What stays whole in each process where ``fully_shard`` spreads a model over several: the
    biases, the norms and the task head. They are few, and train.

    Args:
        model: a transformers model, before any of its modules is sharded.
    Returns:
        The ``ignored_params`` of every call of ``fully_shard``.
    Raises:
        BiasError: the task head is quantised.
    Example:
        >>> from beft_ext.models import unsharded
        >>> whole = unsharded(model)
        >>> len(whole), sum(p.numel() for p in whole)
        (25, 834)
    """
    vectors = {p for p in inside(model).parameters() if p.ndim == 1}
    return vectors.union(head_parameters(inside(model)))


def output_layer(model: nn.Module) -> nn.Module | None:
    """What turns a language model's hidden states into logits; None where there is none."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None
