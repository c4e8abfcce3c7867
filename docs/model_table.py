"""Which model types are known? Builds a tiny random model of each type of transformers, proves
each slice, and writes docs/models.md.

A slice is proved in float64 (float32 where a model knows no float64). By perturbation: with the
bias of one layer moved, the first attention in which anything changes must see exactly one of
its operands change: the query, the key or the value, found among the matrix products around its
softmax. By gradient: what the tap gives must be autograd's gradient of the parameter.

    python docs/model_table.py            # writes docs/models.md
    python docs/model_table.py bert t5    # tells of these alone
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from beft_ext.files import whole_file
from beft_ext.models import Bias, BiasError, add_bias, find_projections
from beft_ext.tap import Tap

OUT = Path(__file__).parent / "models.md"
LARGEST = 20_000_000  # parameters of a model that counts as tiny
TOKENS, VOCABULARY = 7, 64

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
    "vocab_size": VOCABULARY,
    "max_source_positions": 16,
    "num_experts_per_tok": 2,
    "qk_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# What a type needs beyond that.
HEADS, FULL = {"head_dim": 8}, {"layer_types": ["full_attention"] * 2}
LATENT = {"head_dim": 4, "num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [0, 1]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"), LATENT),
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "youtu": LATENT,
    "esm": {"vocab_size": VOCABULARY, "position_embedding_type": "absolute"},
    "falcon": {"new_decoder_architecture": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), HEADS),
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "led": {"attention_window": [4, 4]},
    "longformer": {"attention_window": 4},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "xmod": {"default_language": "en_XX"},
    **dict.fromkeys(("qwen3_5_text", "qwen3_next", "olmo_hybrid"), FULL),
    "longt5": {"local_radius": 3},
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


@dataclass(frozen=True)
class Verdict:
    """What was found of one type. proved: False where ``why`` says what stands against it."""

    name: str
    model: str
    terms: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    layout: str = ""
    proved: bool = False
    why: str = ""


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
    """A tiny random model in eval mode, biases not zero."""
    config, kind = CONFIG_MAPPING[name](), getattr(transformers, class_name(name))
    inner = getattr(config, "text_config", None)
    if isinstance(inner, kind.config_class):
        config = inner
    for key, value in SIZES.items():
        if key.endswith("token_id") or isinstance(getattr(config, key, None), int):
            with suppress(AttributeError, NotImplementedError):  # derived from others
                setattr(config, key, value)
    if isinstance(getattr(config, "layer_types", None), list):
        with suppress(AttributeError):
            config.layer_types = config.layer_types[:2]
    for key, value in (OWN.get(name, {}) | (own or {})).items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the grouped product knows no float64
    config.use_cache = False
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"no tiny model: {size:,} parameters")
    torch.manual_seed(0)
    model: nn.Module = kind(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(model: Any) -> dict[str, Tensor]:
    """Two examples with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        pixels = torch.randn(2, config.num_channels, size, size, generator=generator).to(
            model.dtype
        )
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    if model.main_input_name == "input_features":
        length = 2 * config.max_source_positions
        features = torch.randn(2, config.num_mel_bins, length, generator=generator).to(model.dtype)
        return {"input_features": features, "labels": ids}
    return {"input_ids": ids, "labels": ids.clone()}


def verify(name: str, own: dict[str, Any] | None = None, title: str = "") -> Verdict:
    """Builds the type's model and proves each slice of query, key and value."""
    title, kind, why = title or name, class_name(name), ""
    for dtype in (torch.float64, torch.float32):  # some models' masks are not of the first
        try:
            model = tiny(name, dtype, own)
            batch = inputs(model)
            with torch.no_grad():
                model(**batch)
            break
        except Exception as error:  # transformers' own, of every kind
            why = why or f"no tiny model: {_first(error)}"
    else:
        return Verdict(title, kind, why=why)
    try:
        projections = find_projections(model)
    except BiasError:
        return Verdict(title, kind, why="no query, key and value projections are found")
    terms = tuple(dict.fromkeys(p.bias.term for p in projections))
    added = tuple(dict.fromkeys(p.bias.term for p in projections if p.linear and not p.has_bias))
    fused = [
        p.bias for p in projections if p.bias.module.count(".") and _sliced(p.bias, projections)
    ]
    verdict = Verdict(title, kind, terms, added, _layout(fused))
    for path in dict.fromkeys(p.bias.module for p in projections if p.linear and not p.has_bias):
        parameter = add_bias(model.get_submodule(path))
        with torch.no_grad():
            parameter.normal_(0, 0.1)
    biases = [p.bias for p in find_projections(model) if p.linear]
    looked_at = [b for b in biases if b.term.removeprefix("cross_") in ("query", "key", "value")]
    try:
        why = _perturbed(model, batch, looked_at) or _gradients(model, batch, looked_at)
    except Exception as error:
        why = _first(error)
    return Verdict(**(vars(verdict) | {"proved": why is None, "why": why or ""}))


class _Attentions(TorchDispatchMode):
    """Records query, key and value of each softmax attention that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []
        self.found: list[list[Tensor]] = []
        self.weights: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = func.overloadpacket.__name__
        if kind in ("bmm", "baddbmm", "mm"):
            left, right = args[-2:] if kind == "baddbmm" else args[:2]
            if self.weights is not None and _like(left, self.weights):
                self.found[-1].append(right.clone())
                self.weights = None
            self.products.append((left.clone(), right.clone(), out))
        elif kind == "_softmax":
            near = [p for p in self.products[-4:] if _like(p[2], out)]
            if near and out.ndim >= 3:
                self.found.append([near[-1][0], near[-1][1]])
                self.weights = out
        return out


def _like(a: Tensor, b: Tensor) -> bool:
    """As many elements, but for the one more column of an attention sink."""
    return abs(a.numel() - b.numel()) <= b.numel() // 4


@torch.no_grad()
def _attentions(model: nn.Module, batch: dict[str, Tensor]) -> list[list[Tensor]]:
    torch.manual_seed(0)
    with _Attentions() as seen:
        model(**batch)
    return [found for found in seen.found if len(found) == 3]


def _perturbed(model: nn.Module, batch: dict[str, Tensor], biases: list[Bias]) -> str | None:
    """Why a slice is not what it is called, or None. Shared biases move several layers."""
    before = _attentions(model, batch)
    if not before:
        return "its attention is not a softmax between two matrix products"
    for bias in biases:
        parameter = model.get_parameter(bias.parameter)
        kept = parameter.detach().clone()
        with torch.no_grad():
            bias.view(parameter).add_(torch.randn_like(bias.view(parameter)))
        after = _attentions(model, batch)
        with torch.no_grad():
            parameter.copy_(kept)
        moved = next(
            (m for a, b in zip(before, after, strict=True) if any(m := _moved(a, b))), None
        )
        wanted = ("query", "key", "value").index(bias.term.removeprefix("cross_"))
        if moved is None:
            return f"the {bias.term} of layer {bias.layer} moves nothing"
        if moved[wanted] < 0.4 or any(m for i, m in enumerate(moved) if i != wanted):
            return f"the {bias.term} of layer {bias.layer} moves {moved}"
    return None


def _moved(before: list[Tensor], after: list[Tensor]) -> list[float]:
    """The share of each operand's elements that changed."""
    pairs = zip(before, after, strict=True)
    return [float(((a - b).abs() > 1e-5).double().mean()) for a, b in pairs]


def _gradients(model: nn.Module, batch: dict[str, Tensor], biases: list[Bias]) -> str | None:
    """Why the tap's gradients are not autograd's, or None."""
    model.requires_grad_(False)
    names = dict.fromkeys(b.parameter for b in biases)
    own = [model.get_parameter(n).requires_grad_(True) for n in names]
    model(**batch).loss.backward()
    plain = {n: p.grad.clone() for n, p in zip(names, own, strict=True) if p.grad is not None}
    for parameter in own:
        parameter.grad = None
    with Tap(model, biases) as tap:
        tap.step(2, 2.0)
        model(**batch).loss.backward()
        for bias, leaf in tap.leaves():
            if bias.parameter not in plain or leaf.grad is None:
                return f"the {bias.term} of layer {bias.layer} gets no gradient"
            expected = bias.view(plain[bias.parameter])
            if not _equal(leaf.grad, expected):
                return f"the gradient of the {bias.term} of layer {bias.layer} differs"
    return None


def _equal(found: Tensor, expected: Tensor) -> bool:
    """To the rounding of a sum over all tokens."""
    error = (found - expected).abs().max()
    return bool(error <= 64 * torch.finfo(found.dtype).eps * max(1.0, float(expected.abs().max())))


def _sliced(bias: Bias, projections: list[Any]) -> bool:
    return sum(p.bias.module == bias.module for p in projections) > 1


def _layout(fused: list[Bias]) -> str:
    if not fused:
        return ""
    kinds = {("per head or group" if b.groups > 1 else "blocks") for b in fused}
    return f"{fused[0].module.rpartition('.')[2]}: {', '.join(sorted(kinds))}"


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:110]


def verdicts(names: list[str]) -> Iterator[Verdict]:
    """Of each type, and of its other layouts."""
    for name in names:
        yield verify(name)
        for variant, own in VARIANTS.get(name, {}).items():
            yield verify(name, own, f"{name} ({variant})")


def page(found: list[Verdict]) -> str:
    """docs/models.md."""
    proved = [v for v in found if v.proved]
    count = len({v.name.partition(" ")[0] for v in proved})
    lines = [
        "# Model types",
        "",
        f"Written by `docs/model_table.py` with transformers {transformers.__version__}: "
        f"**{count} types verified**.",
        "",
        "Verified: on a tiny random model of the type, each slice of query, key and value is",
        "proved by perturbation and by gradient against autograd. *Added* terms have no bias of",
        "their own: `prepare` gives them one. Experts of a mixture have no term: which example",
        "trains which expert is decided token by token.",
        "",
        "| type | model | terms | added | fused |",
        "| --- | --- | --- | --- | --- |",
    ]
    for v in proved:
        cells = (v.name, v.model, ", ".join(v.terms), ", ".join(v.added) or "none", v.layout)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Not verified",
        "",
        "A type with other names is described by a hint: `find_biases(model, names={...})`.",
        "",
        "| type | why |",
        "| --- | --- |",
    ]
    lines += [f"| {v.name} | {v.why.replace('|', '/')} |" for v in found if not v.proved]
    return "\n".join(lines) + "\n"


@contextmanager
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(names: list[str]) -> None:
    with quiet():
        found = []
        for verdict in verdicts(names or types()):
            found.append(verdict)
            print(f"{verdict.name}: {'verified' if verdict.proved else verdict.why}", flush=True)
    if not names:
        with whole_file(OUT) as temporary:
            temporary.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
