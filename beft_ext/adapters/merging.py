"""An adapter made part of a plain model, and taken out of it again."""

from __future__ import annotations

from torch import nn

from beft_ext.adapters.applying import Adapters, Merged, guard, release
from beft_ext.adapters.contents import AdapterError
from beft_ext.models import BiasError, make_plain, state, undo_plain, wrappers
from beft_ext.training.preparation import mark, prepared_of, unmark


def merge_adapter(model: nn.Module) -> None:
    """Make the trained or active adapter part of a plain model, which ``save_pretrained`` writes
    and transformers loads without us.

    Where biases were added, the config's own flag (LLaMA's and Gemma's ``attention_bias``,
    LLaMA's ``mlp_bias``) is set, and the biases that it brings along are zero; GPT-Neo's value
    bias is folded into the output projection.

    Raises: AdapterError for a family that has no such place (Mistral, GPT-J, T5), a model merged
        already, one without an adapter, and one in several processes or wrapped by PEFT.
    """
    model = wrappers.whole(model, AdapterError)
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
    state.take(model, Adapters)
    state.put(model, Merged(plain, prepared, adapters))


def unmerge_adapter(model: nn.Module) -> None:
    """Undo ``merge_adapter``: prepared again, or the adapter loaded and active, as it was then.

    ``set_adapter(model, None)`` or ``restore`` then leads to the base.

    Raises: AdapterError for a model that was not merged.
    """
    model = wrappers.whole(model, AdapterError)
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
