"""Models and inputs that the benchmarks share: random weights of published shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers
from torch import Tensor, nn

BATCH, TOKENS, WORDS = 16, 128, 30000
CONFIGS = {
    "MiniLM": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "BERT-base": {},
}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"intermediate_size": 128}


def chosen(quick: bool) -> dict[str, dict[str, int]]:
    """The models of a benchmark: a tiny one for a quick run."""
    return {"tiny": TINY} if quick else CONFIGS


def classifier(config: dict[str, int], device: str) -> nn.Module:
    """A BERT classifier in training mode, the same weights each time. Without dropout, so that
    every way of training sees the same losses."""
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        **config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    make = transformers.AutoModelForSequenceClassification.from_config
    model: nn.Module = make(bert).to(device).train()
    return model


def batch(device: str, rows: int = BATCH, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Random tokens without padding, and two classes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, WORDS, (rows, tokens), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def padded_to(tokens: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``(B, tokens)``, filled up with zeros: BERT's padding token and no attention."""
    return {
        k: torch.nn.functional.pad(v, (0, tokens - v.shape[1])) if v.ndim == 2 else v
        for k, v in batch.items()
    }
