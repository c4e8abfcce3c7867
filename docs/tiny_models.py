"""Tiny random models of the types of transformers, and a small batch for each.

Every size in a config is made small, in nested configs too. All arithmetic is float64: where a
model's code asks for float32 (norms, softmax), ``float64_everywhere`` gives it float64.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

LARGEST = 20_000_000  # parameters of a model that counts as tiny
VOCABULARY = 64
LENGTHS, TARGET_LENGTHS = (7, 5, 4), (4, 6, 3)  # tokens of the three rows

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "decoder_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_mem_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dim_ff"), 48),
    **dict.fromkeys(("shared_intermediate_size", "ffn_config_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input", "first_k_dense_replace"), 0),
    "num_kv_shared_layers": 0,
    "vocab_size": VOCABULARY,
    "max_source_positions": 16,
    "num_experts_per_tok": 2,
    "qk_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
TARGET_AS_LONG = ("fsmt",)  # whose decoder reads the source where it is given none
RANDOM = ("drop", "jitter")  # in the names of what is random in training: set to zero

# What a type needs beyond that.
HEADS = {"head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
LATENT = {"head_dim": 4, "num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"), LATENT),
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2, "topk_method": "greedy"},
    **dict.fromkeys(("youtu", "bailing_hybrid", "kimi_linear", "hy_v4", "sarvam_mla"), LATENT),
    **dict.fromkeys(("dots3_note", "dots3_note_text"), LATENT),
    "t5_gemma_module": {"cross_attention_hidden_size": 32},
    "esm": {"vocab_size": VOCABULARY, "position_embedding_type": "absolute"},
    "falcon": {"new_decoder_architecture": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), HEADS),
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "led": {"attention_window": [4, 4]},
    "longformer": {"attention_window": 4},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 4},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "xmod": {"default_language": "en_XX"},
    "longt5": {"local_radius": 3},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": MAMBA | {"attn_layer_indices": [0, 1]},
}
# One type, several layouts.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "falcon": {
        "multi-query": {"new_decoder_architecture": False, "multi_query": True},
        "per head": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
    },
    "gpt_bigcode": {"per head": {"multi_query": False}},
    "deberta-v2": {"relative": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}},
}


class TinyError(ValueError):
    """A type of which no tiny model is built."""


def types() -> list[str]:
    """Every type with a causal, masked or sequence-to-sequence language model."""
    names = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | set(
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    return sorted(
        names | set(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) | {"whisper", "vit"}
    )


def class_name(name: str) -> str:
    """The language model of a type: both ways before one way, which BERT has too."""
    tables = (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    )
    found = next(table[name] for table in tables if name in table)
    return found if isinstance(found, str) else found[0]


def tiny(name: str, dtype: torch.dtype, own: dict[str, Any] | None = None) -> nn.Module:
    """A tiny random model whose biases are not zero, in evaluation mode, with nothing random."""
    config, kind = CONFIG_MAPPING[name](), getattr(transformers, class_name(name))
    inner = getattr(config, "text_config", None)
    if isinstance(inner, kind.config_class):
        config = inner
    _shrink(config)
    for key, value in (own or {}).items():
        setattr(config, key, value)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise TinyError(f"{size:,} parameters at the least")
    torch.manual_seed(0)
    with float64_everywhere() if dtype == torch.float64 else nullcontext():
        model: nn.Module = kind(config).to(dtype).eval()
    if dtype == torch.float64:  # in the class: a tap may run it again from within a backward
        forward = {"forward": float64_everywhere()(kind.forward)}
        model.__class__ = type(kind.__name__, (kind,), forward)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _shrink(config: PreTrainedConfig) -> None:
    """Make ``config`` and the configs in it small, and take what is random out."""
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig):
            _shrink(inner)
    if hasattr(config, "per_layer_config"):
        config.per_layer_config = None
    for key, value in SIZES.items():
        with suppress(AttributeError, NotImplementedError):  # derived from others
            if key.endswith("token_id") or isinstance(getattr(config, key, None), int):
                setattr(config, key, value)
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and any(word in key for word in RANDOM):
            setattr(config, key, 0.0)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and kinds:  # one layer of each kind, two layers at the least
        different = list(dict.fromkeys(kinds))
        with suppress(AttributeError):
            config.layer_types = (different * 2)[: max(2, len(different))]
            config.num_hidden_layers = len(config.layer_types)
    for key, value in OWN.get(config.model_type, {}).items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the grouped product knows no float64
    config.use_cache = False


def inputs(model: Any) -> dict[str, Tensor]:
    """Three rows with labels; texts of unequal length, padded on the tokenizer's side."""
    generator = torch.Generator().manual_seed(0)
    config, rows = model.config, len(LENGTHS)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        pixels = torch.randn(rows, config.num_channels, size, size, generator=generator)
        return {"pixel_values": pixels.to(model.dtype), "labels": torch.arange(rows) % 2}
    left = padding_side(config.model_type) == "left"
    both_ways = config.is_encoder_decoder
    as_long = not both_ways or config.model_type in TARGET_AS_LONG
    labels, _ = _texts(LENGTHS if as_long else TARGET_LENGTHS, -100, left, generator)
    if model.main_input_name == "input_features":
        length = 2 * config.max_source_positions
        features = torch.randn(rows, config.num_mel_bins, length, generator=generator)
        return {"input_features": features.to(model.dtype), "labels": labels}
    pad = config.get_text_config().pad_token_id or 0
    ids, mask = _texts(LENGTHS, pad, left, generator)
    labels = labels if both_ways else ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    known = inspect.signature(model.forward).parameters
    return {name: tensor for name, tensor in batch.items() if name in known}


def padding_side(model_type: str) -> str:
    """On which side the type's own tokenizer pads."""
    found = TOKENIZER_MAPPING_NAMES.get(model_type)
    try:
        return getattr(getattr(transformers, found or "", None), "padding_side", "right")
    except ImportError:  # a tokenizer that needs an optional package
        return "right"


def _texts(
    lengths: tuple[int, ...], padding: int, left: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random tokens ``(B, T)`` and their mask."""
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    places = torch.arange(max(lengths))
    mask = (places.flip(0) if left else places) < torch.tensor(lengths)[:, None]
    return ids.where(mask, torch.tensor(padding)), mask.long()


class _Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **named)


@contextmanager
def float64_everywhere() -> Iterator[None]:
    """Within it, what asks for float32 gets float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubled():
            yield
    finally:
        torch.set_default_dtype(before)
