"""sentence-transformers: its wrapper and the model inside give the same files."""

import numpy as np
import pytest
import torch
from conftest import close

from beft_ext import (
    find_biases,
    load_adapter,
    merge_adapter,
    prepare,
    restore,
    save_adapter,
    select,
    set_adapter,
    tune,
)
from beft_ext.training.loss import model_loss
from beft_ext.training.preparation import prepared_of
from beft_ext.training.recipe import Recipe

sentences = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed"
)
TEXTS = ["abc def", "x y z", "hello world", "fine day", "cab fed", "zyx"]
WAYS = {"wrapper": lambda wrapper: wrapper, "inside": lambda wrapper: wrapper[0].auto_model}


def encoder(folder):
    torch.manual_seed(0)
    return sentences.SentenceTransformer(folder, device="cpu").eval()


def ranker(folder):
    torch.manual_seed(0)
    return sentences.CrossEncoder(folder, num_labels=3, device="cpu").eval()


def rows(wrapper, number):
    """Arguments of the model inside, with a class for each text."""
    texts = TEXTS[number:] + TEXTS[:number]
    features = wrapper.tokenizer(texts, padding=True, return_tensors="pt")
    return {**features, "labels": torch.arange(len(texts)) % 3}


def similarity(wrapper):
    """Losses of pairs of texts, by the wrapper's own call, whatever model select hands over."""

    def embedded(batch, side):
        named = ("input_ids", "attention_mask")
        return wrapper({n: batch[f"{n}_{side}"] for n in named})["sentence_embedding"]

    def loss(_, batch):
        both = (embedded(batch, side) for side in "ab")
        return (torch.nn.functional.cosine_similarity(*both) - batch["labels"]) ** 2

    return loss


def pairs(wrapper, number):
    half = len(TEXTS) // 2
    features = wrapper.tokenizer(TEXTS, padding=True, return_tensors="pt")
    named = [(n, features[n].roll(number, 0)) for n in ("input_ids", "attention_mask")]
    sides = {
        f"{n}_{side}": t for n, v in named for side, t in zip("ab", v.split(half), strict=True)
    }
    return {**sides, "labels": torch.tensor([0.0, 1.0, 0.0])}


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".png"}


def worked(make, loader, loss, folder, way, tmp_path):
    """Select, prepare, tune and save through one way in; returns the wrapper."""
    wrapper = make(folder)
    model, out = way(wrapper), tmp_path
    given, batches = loss(wrapper), [loader(wrapper, number) for number in range(3)]
    select(model, batches, loss=given).save(out / "selection")
    prepare(model, "value")
    tune(model, batches, recipe=Recipe(epochs=1, lr=1e-2), loss=given)
    save_adapter(model, out / "adapter", selection=out / "selection")
    return wrapper.eval()


CASES = {"embeddings": (encoder, pairs, similarity), "scores": (ranker, rows, lambda _: model_loss)}


@pytest.mark.parametrize("case", CASES)
def test_the_wrapper_and_the_model_inside_give_the_same_files(case, tiny_folder, tmp_path):
    make, loader, loss = CASES[case]
    trained = {
        name: worked(make, loader, loss, tiny_folder, way, tmp_path / name)
        for name, way in WAYS.items()
    }
    for part in ("selection", "adapter"):
        assert files(tmp_path / "wrapper" / part) == files(tmp_path / "inside" / part)
    assert len(files(tmp_path / "inside" / "adapter")) == 3
    for way in WAYS.values():
        fresh = make(tiny_folder)
        assert str(find_biases(way(fresh))) == str(find_biases(fresh))
        before, want = outputs(fresh), outputs(trained["wrapper"])
        load_adapter(way(fresh), tmp_path / "wrapper" / "adapter")
        close(outputs(fresh), want)
        assert (before - want).abs().max() > 1e-4
        set_adapter(fresh, None)
        assert torch.equal(outputs(fresh), before)
        load_adapter(fresh, tmp_path / "inside" / "adapter", trainable=True)
        assert prepared_of(way(fresh)).terms == ("value",)
        merge_adapter(fresh).save_pretrained(str(tmp_path / "merged"))
        close(outputs(make(str(tmp_path / "merged"))), want)


class Dense(torch.nn.Linear):
    """As sentence-transformers' own, whose place differs between versions."""

    def forward(self, features):
        features["sentence_embedding"] = super().forward(features["sentence_embedding"])
        return features


def test_what_lies_beside_the_model_inside_is_frozen_and_given_back(tiny_folder, tmp_path):
    """A Dense module comes after the transformer, and no adapter has it."""
    wrapper = encoder(tiny_folder)
    wrapper.append(Dense(outputs(wrapper).shape[1], 8))
    wrapper[-1].bias.requires_grad_(False)
    before = {n: p.requires_grad for n, p in wrapper.named_parameters()}
    loss, batches = similarity(wrapper), [pairs(wrapper, number) for number in range(3)]
    assert prepare(wrapper, "value").head == []
    trained = [n for n, p in wrapper.named_parameters() if p.requires_grad]
    assert trained and all(n.endswith("value.bias") for n in trained)
    dense = wrapper[-1].weight.clone()
    tune(wrapper, batches, recipe=Recipe(epochs=1, lr=1e-2), loss=loss)
    assert torch.equal(wrapper[-1].weight, dense) and wrapper[-1].weight.grad is None
    save_adapter(wrapper, tmp_path)
    restore(wrapper)
    assert {n: p.requires_grad for n, p in wrapper.named_parameters()} == before


def outputs(wrapper):
    """By the wrapper's own verb."""
    if isinstance(wrapper, sentences.CrossEncoder):
        found = wrapper.predict([(t, t) for t in TEXTS], show_progress_bar=False)
    else:
        found = wrapper.encode(TEXTS, show_progress_bar=False)
    return torch.from_numpy(np.asarray(found))
