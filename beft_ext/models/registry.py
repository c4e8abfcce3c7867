"""How projections are called inside a layer: the only place that knows names.

An attention is a module with children of one of the ATTENTIONS' names, or with one of the FUSED
projections. The rest goes by endings: an ending matches whole dotted components of a module's
path within its layer, and the longest that matches wins, so ``attention.output.dense`` is not
taken for ``output.dense``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Names of query, key and value side by side in one module.
ATTENTIONS: tuple[tuple[str, str, str], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_head", "k_head", "v_head"),
    ("project_q", "project_k", "project_v"),
    ("Wq", "Wk", "Wv"),
    ("q", "k", "v"),
)

# Modules with such children that are no softmax attention: linear attention, sparse indexers.
NO_ATTENTION = ("linear_attn", "mlstm_layer", "indexer", "compressor", "mixer")

# A path through one of these is cross-attention: its terms are called cross_<term>.
CROSS = ("crossattention", "cross_attention", "cross_attn", "encoder_attn", "EncDecAttention")

# Paths through experts are left out: which example trains which expert is decided token by
# token, so an expert's bias has no gradient of every example.
EXPERTS = ("experts", "shared_expert", "shared_experts", "block_sparse_moe")

# A config with <modality>_config in it is of a language model with towers beside it.
MODALITIES = ("text", "vision", "audio")

ENDINGS: dict[str, tuple[str, ...]] = {
    "attention_output": ("attention.output.dense", "crossattention.output.dense",
                         "attention.dense", "attention.o_proj", "attention.out_lin",
                         "self_attn.out_proj",
                         "self_attn.o_proj", "self_attn.dense", "self_attn.output",
                         "self_attention.dense", "attentions.out_lin", "attn.out_proj",
                         "attn.o_proj", "attn.attention.out_proj", "attn.c_proj", "attn.Wo",
                         "attn.o", "attention.post_proj", "encoder_attn.out_proj",
                         "encoder_attn.output", "cross_attn.out_proj", "cross_attn.o_proj",
                         "cross_attention.out_proj", "self_attention.attention_out",
                         "multi_head_attention.dense", "norm_attn_norm.attn.out_proj",
                         "self_attn.o_proj.linear", "SelfAttention.o", "LocalSelfAttention.o",
                         "TransientGlobalSelfAttention.o", "EncDecAttention.o"),
    "mlp_up": ("intermediate.dense", "ffn", "ffn.lin1", "fc1", "ffn.fc1", "mlp.fc1", "mlp.c_fc",
               "mlp.up_proj", "ffn.up_proj", "mlp.fc_in", "mlp.dense_h_to_4h", "ffn.0",
               "ffn.linear_1", "feed_forward.w3", "feed_forward.up_proj",
               "feed_forward.intermediate", "DenseReluDense.wi", "DenseReluDense.wi_1"),
    # What goes through the activation, and is multiplied with mlp_up.
    "mlp_gate": ("mlp.gate_proj", "ffn.gate_proj", "feed_forward.gate_proj", "feed_forward.w1",
                 "DenseReluDense.wi_0"),
    "mlp_down": ("output.dense", "ffn_output", "ffn.lin2", "fc2", "ffn.fc2", "mlp.fc2",
                 "mlp.c_proj", "mlp.down_proj", "ffn.down_proj", "mlp.fc_out",
                 "mlp.dense_4h_to_h", "mlp.Wo", "ffn.2", "ffn.linear_2", "feed_forward.w2",
                 "feed_forward.down_proj", "feed_forward.output", "DenseReluDense.wo"),
    "attention_norm": ("attention.output.LayerNorm", "crossattention.output.LayerNorm",
                       "attention.LayerNorm", "attention.ln", "attention.layer_norm",
                       "sa_layer_norm", "self_attn_layer_norm", "attention.self_attn_layer_norm",
                       "encoder_attn_layer_norm", "cross_attention_layer_norm",
                       "cross_attn_layer_norm", "ln_1", "layer_norm1", "layernorm1", "norm_1",
                       "attn_norm", "input_layernorm", "layernorm_before"),
    "mlp_norm": ("output.LayerNorm", "full_layer_layer_norm", "output_layer_norm",
                 "final_layer_norm", "feed_forward_layer_norm", "ff_layer_norm",
                 "ffn_layer_norm", "ffn.layer_norm", "ln", "ln_2", "layer_norm2", "layernorm2",
                 "norm_2", "mlp_norm", "post_attention_layernorm", "layernorm_after"),
}  # fmt: skip

# Gate and up one after the other in one projection.
GATE_UP = ("mlp.gate_up_proj", "feed_forward.gate_up_proj", "mlp.Wi")

Slices = list[tuple[str, int, int]]
Layout = Callable[["PreTrainedConfig", int], tuple[int, Slices]]


def blocks(config: PreTrainedConfig, size: int) -> tuple[int, Slices]:
    """Query, key and value one after the other; key and value of as many heads as they have."""
    heads, shared = _heads(config)
    width = size // (heads + 2 * shared)
    q, k = heads * width, shared * width
    return 1, [("query", 0, q), ("key", q, q + k), ("value", q + k, q + 2 * k)]


def by_head(config: PreTrainedConfig, size: int) -> tuple[int, Slices]:
    """Head by head, each its query, key and value."""
    heads, _ = _heads(config)
    width = size // (3 * heads)
    slices = enumerate(("query", "key", "value"))
    return heads, [(term, i * width, (i + 1) * width) for i, term in slices]


def by_group(config: PreTrainedConfig, size: int) -> tuple[int, Slices]:
    """Group by group: the queries of its heads, then their one key and value."""
    heads, shared = _heads(config)
    width = size // (heads + 2 * shared)
    q = heads // shared * width
    return shared, [("query", 0, q), ("key", q, q + width), ("value", q + width, q + 2 * width)]


def by_kind(config: PreTrainedConfig, size: int) -> tuple[int, Slices]:
    """Falcon's, GPT-BigCode's and ChatGLM's configs say which; BLOOM, GPT-NeoX and others go by
    head."""
    if getattr(config, "new_decoder_architecture", False):
        return by_group(config, size)
    flags = ("multi_query", "multi_query_attention")
    return (blocks if any(getattr(config, f, False) for f in flags) else by_head)(config, size)


def side_by_side(config: PreTrainedConfig, size: int) -> tuple[int, Slices]:
    """GPT-2's three blocks; GPT-BigCode's only where it has one key and value for all heads."""
    return (by_head if getattr(config, "multi_query", True) is False else blocks)(config, size)


def latent(config: PreTrainedConfig, size: int) -> tuple[int, Slices]:
    """DeepSeek's multi-head latent attention: head by head the key's part without positions,
    then the value."""
    key, value = config.qk_nope_head_dim, config.v_head_dim
    return size // (key + value), [("key", 0, key), ("value", key, key + value)]


def by_quarter(_: PreTrainedConfig, size: int) -> tuple[int, Slices]:
    """CodeGen's four parts, made for four devices, each with query, value and key."""
    width = size // 12
    return 4, [("query", 0, width), ("value", width, 2 * width), ("key", 2 * width, 3 * width)]


# By the ending of the path: the longest that matches wins.
FUSED: dict[str, Layout] = {
    "c_attn": side_by_side,
    "query_key_value": by_kind,
    "qkv_proj": blocks,
    "attn.qkv_proj": by_quarter,
    "Wqkv": blocks,
    "qkv": blocks,
    "kv_b_proj": latent,
}

# The query of a latent attention, where it is not called q_proj.
LATENT_QUERIES: dict[str, str] = {"q_b_proj": "query"}

# Attentions without a flag for a value bias but with a biased output projection beside it: the
# value bias can be folded into that one, for the rows of these attentions sum to one.
VALUE_FOLDS: dict[str, str] = {"attn.attention.v_proj": "out_proj"}


def _heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Heads of the query, and of key and value."""
    heads = config.num_attention_heads
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return heads, 1
    inner = getattr(config, "attn_config", None)  # DBRX keeps it apart
    named = [(config, "num_key_value_heads"), (config, "num_kv_heads"), (inner, "kv_n_heads")]
    if getattr(config, "multi_query_attention", False):  # ChatGLM
        named.insert(0, (config, "multi_query_group_num"))
    found = (getattr(owner, name, None) for owner, name in named)
    return heads, next((count for count in found if isinstance(count, int)), heads)
