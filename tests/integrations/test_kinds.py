"""Other kinds of models go by the same calls: questions, tokens, pictures, speech."""

import pytest
import torch
import transformers as hf
from conftest import MLP, SIZES, close

from beft_ext import (
    Recipe,
    load_adapter,
    merge_adapter,
    prepare,
    save_adapter,
    select,
    tune,
    unmerge_adapter,
)
from beft_ext.training.preparation import prepared_of

BODY = {k: v for k, v in SIZES.items() if k != "vocab_size"} | MLP
VIT = {"image_size": 16, "patch_size": 8, "num_labels": 3}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
SOUND = {**CONVOLUTIONS, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SOUND |= {"mask_time_prob": 0.0, "classifier_proj_size": 16, "num_labels": 3}
WHISPER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 16}
WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64}
WHISPER |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 20}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def places(chance):
    """Where an answer begins and ends."""
    start = torch.randint(0, 4, (4,), generator=chance)
    return {"start_positions": start, "end_positions": start + 2}


def ids(chance, tokens=8):
    return torch.randint(3, 64, (4, tokens), generator=chance)


def classes(chance):
    return {"labels": torch.randint(0, 3, (4,), generator=chance)}


# A model, and a batch drawn from a generator.
KINDS = {
    "question answering": (
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SIZES, **MLP)),
        lambda g: {"input_ids": ids(g), **places(g)},
    ),
    "tokens": (
        lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES, **MLP, num_labels=3)),
        lambda g: {"input_ids": ids(g), "labels": torch.randint(-1, 3, (4, 8), generator=g)},
    ),
    "pictures": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**BODY, **VIT)),
        lambda g: {"pixel_values": torch.randn(4, 3, 16, 16, generator=g), **classes(g)},
    ),
    "sounds": (
        lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**BODY, **SOUND)),
        lambda g: {"input_values": torch.randn(4, 400, generator=g), **classes(g)},
    ),
    "speech to text": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        lambda g: {"input_features": torch.randn(4, 16, 40, generator=g), "labels": ids(g)},
    ),
}


def made(kind):
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batches(kind):
    chance = torch.Generator().manual_seed(0)
    found = [KINDS[kind][1](chance) for _ in range(3)]
    for batch in found:
        if kind == "tokens":
            batch["labels"] = batch["labels"].masked_fill(batch["labels"] < 0, -100)
    return found


def answers(model, batch):
    with torch.no_grad():
        found = model.eval()(**batch)
    return [t for n, t in found.items() if "logits" in n]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_goes_the_whole_way(kind, tmp_path):
    """Selected, prepared, trained, saved, loaded, merged; the base is untouched by a selection."""
    model, loader = made(kind), batches(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    selection = select(model, loader)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert "value" in selection.ranking["gain"] and selection.best in selection.ranking["gain"]
    prepared = prepare(model, "value")
    assert prepared.biases and (prepared.head or kind == "speech to text")
    run = tune(model, loader, evaluate=loader[:1], recipe=Recipe(epochs=2, lr=1e-2))
    assert run.step == 6
    save_adapter(model, tmp_path / "adapter", selection)
    wanted = answers(model, loader[0])
    base = answers(made(kind), loader[0])
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(wanted, base, strict=True))
    fresh = load_adapter(made(kind), tmp_path / "adapter")
    for found, want in zip(answers(fresh, loader[0]), wanted, strict=True):
        close(found, want)
    again = load_adapter(made(kind), tmp_path / "adapter", trainable=True)
    assert prepared_of(again).terms == prepared.terms
    merge_adapter(fresh).save_pretrained(tmp_path / "merged")
    plain = type(fresh).from_pretrained(tmp_path / "merged")
    for found, want in zip(answers(plain, loader[0]), wanted, strict=True):
        close(found, want)
    unmerge_adapter(fresh)
