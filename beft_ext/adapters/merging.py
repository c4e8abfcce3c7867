"""An adapter made part of a plain model, and taken out of it again."""

from __future__ import annotations

from torch import nn

from beft_ext.adapters.applying import Adapters, Merged, guard, release
from beft_ext.adapters.contents import AdapterError
from beft_ext.models import BiasError, make_plain, offload, state, undo_plain, wrappers
from beft_ext.tap import require_untapped
from beft_ext.training.preparation import mark, prepared_of, unmark


def merge_adapter(model: nn.Module) -> nn.Module:
    """Make the trained or active adapter part of a plain model.

    ``save_pretrained`` then writes the model, and transformers loads it without beft_ext.

    Where biases were added, the flag of the config that gives the model's class these biases is
    set (``attention_bias`` of LLaMA and Gemma, ``mlp_bias`` of LLaMA). Other biases that the
    flag brings along are zero. GPT-Neo's value bias is folded into the output projection.

    Args:
        model: a prepared model, or one with an active adapter.
    Returns:
        The model that was given.
    Raises:
        AdapterError: a family without a place for the added bias (Mistral, GPT-J, T5); a model
            without an adapter; a model that is merged already, tapped, wrapped by PEFT, or spread
            over processes or devices. The model is as it was.
    Example:
        >>> import beft_ext
        >>> prepared = beft_ext.prepare(model)
        >>> beft_ext.merge_adapter(model).save_pretrained("merged")
    Source: docs/definitions.md, section 5, for the folded value bias.
    """
    given, model = model, wrappers.whole(model, AdapterError)
    require_untapped(model, AdapterError)
    if state.get(model, Merged) is not None:
        raise AdapterError("an adapter is merged here already: unmerge_adapter(model) undoes it")
    prepared, adapters = prepared_of(model), state.get(model, Adapters)
    if prepared is not None:
        added = [n.removesuffix(".bias") for n in prepared.added]
    elif adapters is not None and adapters.active is not None:
        biases = adapters.named[adapters.active].biases
        added = [m for m in biases if adapters.base[f"{m}.bias"] is None]
    else:
        raise AdapterError("nothing to merge: neither prepared nor with an active adapter")
    try:
        plain = make_plain(model, added)
    except BiasError as error:
        raise AdapterError(str(error)) from error
    if prepared is not None:
        unmark(model)
    if adapters is not None:
        release(adapters)
    offload.describe(model)
    state.take(model, Adapters)
    state.put(model, Merged(plain, prepared, adapters))
    return given


def unmerge_adapter(model: nn.Module) -> None:
    """Undo ``merge_adapter``: the model is prepared again, or has its active adapter again.

    ``restore``, or ``set_adapter(model, None)``, then leads to the base.

    Args:
        model: a merged model.
    Raises:
        AdapterError: no adapter is merged, or the model is tapped, wrapped by PEFT or spread since.
    Example:
        >>> import beft_ext
        >>> prepared = beft_ext.prepare(model)
        >>> model = beft_ext.merge_adapter(model)
        >>> beft_ext.unmerge_adapter(model)
        >>> beft_ext.restore(model)
    """
    model = wrappers.whole(model, AdapterError)
    require_untapped(model, AdapterError)
    merged = state.take(model, Merged)
    if merged is None:
        raise AdapterError("no adapter is merged here: there is nothing to undo")
    undo_plain(model, merged.plain)
    if merged.prepared is not None:
        mark(model, merged.prepared)
    if merged.adapters is not None:
        state.put(model, merged.adapters)
        if merged.adapters.active is not None:
            guard(model, merged.adapters)
