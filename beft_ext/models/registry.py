"""How projections are called inside a layer: the only place that knows names.

An ending matches whole dotted components of a module's path within its layer; the longest
ending that matches wins, so ``attention.output.dense`` is not taken for ``output.dense``.
"""

from __future__ import annotations

ENDINGS: dict[str, tuple[str, ...]] = {
    "query": ("attention.self.query", "attention.self.query_proj", "attention.query",
              "attention.q_lin", "self_attn.q_proj", "attn.q_proj", "attn.attention.q_proj",
              "SelfAttention.q"),
    "key": ("attention.self.key", "attention.self.key_proj", "attention.key",
            "attention.k_lin", "self_attn.k_proj", "attn.k_proj", "attn.attention.k_proj",
            "SelfAttention.k"),
    "value": ("attention.self.value", "attention.self.value_proj", "attention.value",
              "attention.v_lin", "self_attn.v_proj", "attn.v_proj", "attn.attention.v_proj",
              "SelfAttention.v"),
    "attention_output": ("attention.output.dense", "attention.dense", "attention.out_lin",
                         "self_attn.out_proj", "self_attn.o_proj", "self_attn.dense",
                         "attn.out_proj", "attn.attention.out_proj", "attn.c_proj",
                         "SelfAttention.o"),
    "mlp_up": ("intermediate.dense", "ffn", "ffn.lin1", "fc1", "mlp.c_fc", "mlp.up_proj",
               "mlp.fc_in", "mlp.dense_h_to_4h", "DenseReluDense.wi", "DenseReluDense.wi_1"),
    "mlp_down": ("output.dense", "ffn_output", "ffn.lin2", "fc2", "mlp.c_proj", "mlp.down_proj",
                 "mlp.fc_out", "mlp.dense_4h_to_h", "DenseReluDense.wo"),
    "attention_norm": ("attention.output.LayerNorm", "attention.LayerNorm", "sa_layer_norm",
                       "self_attn_layer_norm", "ln_1", "input_layernorm"),
    "mlp_norm": ("output.LayerNorm", "full_layer_layer_norm", "output_layer_norm",
                 "final_layer_norm", "ln_2", "post_attention_layernorm"),
}  # fmt: skip

# Fused query, key and value of equal widths: True where they are interleaved head by head.
FUSED: dict[str, bool] = {"attn.c_attn": False, "attention.query_key_value": True}

# Attentions without a flag for a value bias but with a biased output projection beside it: the
# value bias can be folded into that one, for the rows of these attentions sum to one.
FOLDS: dict[str, str] = {"attn.attention.v_proj": "out_proj"}
