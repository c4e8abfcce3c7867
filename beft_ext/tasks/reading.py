"""How a model reads rows of tokens: what fills them up, on which side, how long they may be."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from beft_ext.tasks.batches import padded
from beft_ext.tasks.rows import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LENGTH_SETTINGS = (  # what configs call the rows of a position table
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_seq_len",
)


@dataclass(frozen=True)
class Reading:
    """What a batch must be like for a row's answer not to depend on its neighbours.

    Attributes:
        fill: value of padding by field; 0 for a field that is not named.
        start: token of a row that would be empty.
        left: pad on the left, for a model that reads its last position whatever lies there.
        longest: tokens of a row, or None without a limit.
        arguments: of the model's forward, or None where they are not known.
    """

    fill: Mapping[str, int]
    start: int
    left: bool = False
    longest: int | None = None
    arguments: Collection[str] | None = None

    def row(self, fields: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """The fields that the model takes, at least one token long, with an attention mask."""
        row = dict(fields)
        if not row["input_ids"]:
            row = {k: [self.start if k == "input_ids" else 0] for k in row}
            row["attention_mask"] = [1]
        row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        return {k: v for k, v in row.items() if self.arguments is None or k in self.arguments}

    def batch(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """``(N, T)`` of each field, T the longest row's."""
        return {k: padded([r[k] for r in rows], self.fill.get(k, 0), self.left) for k in rows[0]}


def reading(model: nn.Module | None, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """How ``model`` reads, on whatever device it is ('meta' suffices); None: any model."""
    config = None if model is None else model.config.get_text_config()
    pad = _pad(config, tokenizer)
    fill = {"input_ids": pad, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    start = next((t for t in _ends(tokenizer) if t is not None), pad)
    longest = _whole(getattr(tokenizer, "model_max_length", None))
    if model is None:
        return Reading(fill, start, longest=longest)
    arguments = set(inspect.signature(_inner(model).forward).parameters)
    if getattr(config, "type_vocab_size", 2) < 2:  # RoBERTa has one type, BERT's tokenizer two
        arguments.discard("token_type_ids")
    limits = [n for n in (longest, *_lengths(model)) if n is not None]
    # XLNet's summary is its last position, be it padding.
    left = getattr(config, "summary_type", None) == "last"
    return Reading(fill, start, left, min(limits, default=None), arguments)


def agree(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make config and tokenizer name the same padding token, so that plain transformers pads as
    we do.

    The tokenizer's is taken, which is in no text; the config's where the model counts positions
    from it, or where the tokenizer has none. Raises DataError where neither has one, and where
    the tokenizer is another model's.
    """
    _check_vocabulary(model, tokenizer)
    config: PreTrainedConfig = model.config
    text = config.get_text_config()
    own = text.pad_token_id
    special = own in tokenizer.all_special_ids
    if own is not None and own != tokenizer.pad_token_id and _tables(model):
        if not special and tokenizer.pad_token_id is not None:
            raise DataError(
                f"its positions count from padding token {own}, which is an ordinary token of the "
                f"tokenizer ({tokenizer.convert_ids_to_tokens(own)!r}): the two are of two models"
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own)
    if tokenizer.pad_token_id is None:
        candidates = [own] if special else []
        if not getattr(config, "is_encoder_decoder", False):  # those classify at their last eos
            candidates.append(tokenizer.eos_token_id)
        candidates += [tokenizer.unk_token_id, tokenizer.bos_token_id]
        found = next((t for t in candidates if t is not None), None)
        if found is None:
            raise DataError(
                "its tokenizer has neither a padding token nor another special one to pad with: "
                "set pad_token in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(found)
    for each in {id(c): c for c in (config, text)}.values():
        each.pad_token_id = tokenizer.pad_token_id


def stated_pad(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The config's padding token where the tokenizer has it; LLaMA's first configs say -1."""
    pad = config.get_text_config().pad_token_id
    return pad if isinstance(pad, int) and pad in tokenizer.get_vocab().values() else None


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the forward of the model, or of what PEFT wraps, names ``argument``."""
    return argument in inspect.signature(_inner(model).forward).parameters


def _inner(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _ends(tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    return [getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "cls", "eos")]


def _pad(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None))
    return next((i for i in ids if isinstance(i, int) and i >= 0), 0)


def _check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings = None
    with suppress(NotImplementedError):  # CANINE hashes characters
        embeddings = getattr(_inner(model).get_input_embeddings(), "weight", None)
    known: Mapping[str, int] = getattr(tokenizer, "get_vocab", dict)()
    if embeddings is not None and known and max(known.values()) >= len(embeddings):
        raise DataError(
            f"its tokenizer has {max(known.values()) + 1} tokens and the model embeds "
            f"{len(embeddings)}: take the tokenizer that belongs to it, or resize its embeddings"
        )


def _tables(model: nn.Module) -> list[int]:
    """Rows for positions in each table that starts after the padding token's (RoBERTa's)."""
    found = []
    for name, module in model.named_modules():
        weight, pad = getattr(module, "weight", None), getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and weight is not None and pad is not None:
            found.append(len(weight) - pad - 1)
    return found


def _lengths(model: nn.Module) -> list[int]:
    config = model.config.get_text_config()
    stated = [_whole(getattr(config, name, None)) for name in LENGTH_SETTINGS]
    return [n for n in stated if n is not None] + _tables(model)


def _whole(number: str | float | None) -> int | None:
    """A limit in tokens; None for none: XLNet's is -1, and some files hold a text."""
    if number is None:
        return None
    try:
        limit = int(number)
    except (TypeError, ValueError, OverflowError):
        return None
    return limit if limit > 0 else None
