"""Adapters: both ways with PEFT, by name, merged; hostile files leave the model as it was."""

import copy
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import batch, close, logits, tiny, train, values
from safetensors.torch import load_file, save_file

from beft_ext import (
    AdapterError,
    PrepareError,
    Tap,
    delete_adapter,
    find_biases,
    load_adapter,
    merge_adapter,
    prepare,
    restore,
    save_adapter,
    select,
    set_adapter,
    unmerge_adapter,
)
from beft_ext.adapters import head_classes, term_facts
from beft_ext.errors import BeftWarning
from beft_ext.training.preparation import prepared_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# An encoder, decoders with biases (one fused), decoders without, and T5.
IN_PEFT = ["bert", "distilbert", "deberta-v2", "opt", "gpt-neox", "qwen2", "llama", "gptj", "t5"]


def tuned(name, folder, terms="value", lr=1e-2):
    """A trained model, its adapter in ``folder``, and its logits."""
    model = tiny(name)
    prepare(model, terms)
    train(model, lr=lr)
    save_adapter(model, folder)
    return model, logits(model)


def flags(model):
    return {k: v for k, v in model.config.to_dict().items() if k.endswith("bias")}


def same(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("name", IN_PEFT)
def test_what_we_save_peft_loads(name, tmp_path, recwarn):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    _, want = tuned(name, tmp_path)
    assert (logits(tiny(name)) - want).abs().max() > 1e-3
    model = peft.PeftModel.from_pretrained(tiny(name), tmp_path)
    close(logits(model), want)
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]


TARGETS = {
    "bert": ["value"],
    "opt": ["v_proj"],
    "gpt-neox": ["query_key_value"],
    "qwen2": ["v_proj"],
    "llama": ["v_proj", "down_proj"],
    "t5": r".*encoder.*SelfAttention\.v$",
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_peft_saved_we_load(name, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.BeftConfig(target_modules=TARGETS[name], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(tiny(name), config)
    train(theirs)
    theirs.save_pretrained(tmp_path)
    model = tiny(name)
    base = values(model)
    load_adapter(model, tmp_path)
    close(logits(model), logits(theirs))
    set_adapter(model, None)
    assert same(model, base)


@pytest.mark.parametrize("name", ["bert", "opt", "llama"])
def test_merged_both_ways(name, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    _, want = tuned(name, tmp_path / "adapter")
    model = tiny(name)
    load_adapter(model, tmp_path / "adapter")
    merge_adapter(model)
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "adapter")
    if name == "llama":
        with pytest.raises(ValueError, match="no bias"):
            theirs.merge_and_unload()
    else:
        close(logits(theirs.merge_and_unload()), logits(model))
    model.save_pretrained(tmp_path / "merged")
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(plain), logits(model))
    close(logits(plain), want)


@pytest.mark.parametrize(
    ("name", "terms"), [("gpt2", "value"), ("bert", "mlp_norm"), ("bert", ("value", "mlp_norm"))]
)
def test_what_peft_cannot_load_we_can_and_say_so(name, terms, tmp_path):
    _, want = tuned(name, tmp_path, terms)
    model = tiny(name)
    load_adapter(model, tmp_path)
    close(logits(model), want)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert "nn.Linear only" in config["auto_mapping"]["beft_ext"]["not_in_peft"]
    assert "does not load in PEFT" in (tmp_path / "README.md").read_text()
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(TypeError, match="is not supported"):
        peft.PeftModel.from_pretrained(tiny(name), tmp_path)


def test_every_family_loads_what_it_saved_and_gives_the_base_back(family, tmp_path):
    _, want = tuned(family, tmp_path, ("query", "value"))
    model = tiny(family)
    base = values(model)
    load_adapter(model, tmp_path)
    close(logits(model), want)
    set_adapter(model, None)
    assert same(model, base)


def test_the_difference_is_zero_outside_the_slice(tmp_path):
    tuned("gpt-neox", tmp_path)
    (name, *_), bias = zip(*load_file(tmp_path / WEIGHTS).items(), strict=True)
    assert name.endswith("query_key_value.beft_bias") and bias[0].shape == (1, 96)
    heads = bias[0].view(4, 3, 8)
    assert heads[:, 2].all() and not heads[:, :2].any()


def test_adapters_switch_by_name_to_the_bit(tmp_path):
    tuned("llama", tmp_path / "a")
    tuned("llama", tmp_path / "b", ("mlp_up", "query"), lr=3e-2)
    model = tiny("llama")
    base, states = values(model), {}
    for name in "ab":
        load_adapter(model, tmp_path / name, name)
        states[name] = values(model)
    for name in ("a", None, "b", "a", None):
        set_adapter(model, name)
        assert same(model, base if name is None else states[name])
    with pytest.raises(AdapterError, match="no adapter 'c' on this model: loaded are a, b"):
        set_adapter(model, "c")
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in base)


def test_the_same_training_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        tuned("bert", tmp_path / folder)
    for file in (WEIGHTS, CONFIG, "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(os.listdir(tmp_path / "a")) == ["README.md", CONFIG, WEIGHTS]
    assert head_classes(tmp_path / "a") == 2


def test_half_precision_comes_back_to_the_bit(tmp_path):
    model = tiny("llama").bfloat16()
    prepare(model, "value")
    train(model)
    save_adapter(model, tmp_path)
    again = tiny("llama").bfloat16()
    load_adapter(again, tmp_path)
    assert same(again, values(model))


def test_an_active_adapter_saves_again(tmp_path):
    tuned("bert", tmp_path / "a")
    model = tiny("bert")
    load_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    again = load_adapter(tiny("bert"), tmp_path / "b", trainable=True)
    assert prepared_of(again).terms == ("value",)
    set_adapter(model, None)
    with pytest.raises(AdapterError, match="nothing to save"):
        save_adapter(model, tmp_path / "c")


def test_training_goes_on_from_an_adapter(tmp_path):
    _, want = tuned("gpt-neox", tmp_path / "a", ("value", "query"))
    model = tiny("gpt-neox")
    prepare(model, "value")
    before = values(model)
    with pytest.raises(AdapterError, match=r"layers\.0\..* beyond the prepared biases"):
        load_adapter(model, tmp_path / "a", trainable=True)
    assert same(model, before)
    restore(model)
    prepare(model, ("query", "value"))
    with pytest.raises(AdapterError, match="load it with trainable=True; else call restore"):
        load_adapter(model, tmp_path / "a")
    assert same(model, before)
    assert load_adapter(model, tmp_path / "a", trainable=True) is model
    close(logits(model), want)
    save_adapter(model, tmp_path / "b")
    first, second = (load_file(tmp_path / n / WEIGHTS) for n in "ab")
    assert all(torch.allclose(first[n], second[n], atol=1e-7) for n in first)


@pytest.mark.parametrize(
    ("name", "terms"),
    [("gpt2", ("value",)), ("llama", ("value@1", "mlp_up")), ("bert", ("query", "mlp_norm"))],
)
def test_loading_to_train_prepares_the_terms_of_the_adapter(name, terms, tmp_path):
    first, want = tuned(name, tmp_path / "a", terms)
    model = load_adapter(tiny(name), tmp_path / "a", trainable=True)
    prepared, before = prepared_of(model), prepared_of(first)
    assert prepared.terms == before.terms and prepared.biases == before.biases
    close(logits(model), want)
    for own in (first, model):
        train(own)
    close(logits(model), logits(first))
    save_adapter(model, tmp_path / "b")
    configs = [json.loads((tmp_path / folder / CONFIG).read_text()) for folder in "ab"]
    assert configs[0]["target_modules"] == configs[1]["target_modules"]
    restore(model)


def test_an_adapter_that_does_not_say_its_terms_trains_those_of_its_modules(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.BeftConfig(target_modules=["query_key_value"])
    theirs = peft.get_peft_model(tiny("gpt-neox"), config)
    train(theirs)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(tiny("gpt-neox"), tmp_path, trainable=True)
    assert prepared_of(model).terms == ("query", "key", "value")
    close(logits(model), logits(theirs))


def test_what_cannot_be_trained_on_leaves_the_model_as_it_was(tmp_path):
    tuned("bert", tmp_path / "a")
    tuned("bert", tmp_path / "b")
    rewrite(tmp_path / "b", lambda t, n: t[n].view(-1)[0].fill_(1e6))
    model = load_adapter(tiny("bert").half(), tmp_path / "a", "a")
    with pytest.raises(AdapterError, match=r"'a' is active: set_adapter\(model, None\) first"):
        load_adapter(model, tmp_path / "a", trainable=True)
    set_adapter(model, None)
    before = values(model)
    with pytest.raises(AdapterError, match=r"beyond what torch.float16 can hold"):
        load_adapter(model, tmp_path / "b", trainable=True)
    assert same(model, before) and prepared_of(model) is None
    assert all(p.requires_grad for p in model.parameters())
    set_adapter(model, "a")


def test_a_deleted_adapter_is_gone_and_the_base_is_back(tmp_path):
    tuned("llama", tmp_path)
    model = tiny("llama")
    base = values(model)
    for name in "ab":
        load_adapter(model, tmp_path, name)
    delete_adapter(model, "a")
    assert not same(model, base)
    delete_adapter(model, "b")
    assert same(model, base)
    model.load_state_dict(base)  # no guard is left
    for name in "ab":
        with pytest.raises(AdapterError, match=f"no adapter '{name}' on this model"):
            set_adapter(model, name)
        with pytest.raises(AdapterError, match=f"no adapter '{name}' on this model"):
            delete_adapter(model, name)


def test_a_loaded_adapter_is_not_trained_over(tmp_path):
    tuned("bert", tmp_path)
    model = tiny("bert")
    load_adapter(model, tmp_path)
    with pytest.raises(PrepareError, match="'default' is active"):
        prepare(model)
    set_adapter(model, None)
    prepare(model)


PLAIN = {"llama": ("value", "mlp_up"), "gemma": ("value",), "gpt-neo": ("value", "mlp_up")}


@pytest.mark.parametrize("name", PLAIN)
def test_a_bias_free_family_merges_into_its_own_class(name, tmp_path):
    model, want = tuned(name, tmp_path / "adapter", PLAIN[name])
    before, config = values(model), flags(model)
    merge_adapter(model)
    close(logits(model), want)
    model.save_pretrained(tmp_path / "merged")
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(plain), logits(model))
    unmerge_adapter(model)
    assert same(model, before) and flags(model) == config
    assert prepared_of(model).terms == PLAIN[name]


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("llama", "mlp_gate"),
        ("llama", "query@0+value@1+mlp_gate@1"),
        ("llama", "mlp_down@0"),
        ("gemma", "value@1"),
        ("bert", "value@1+mlp_up@0"),
        ("gpt-neo", "value@1"),
    ],
)
def test_gates_and_layers_go_the_whole_way(name, terms, tmp_path):
    """Saved, loaded here and by PEFT, merged into a plain folder, and taken out of it again."""
    model, want = tuned(name, tmp_path / "adapter", terms)
    biases = prepared_of(model).biases
    entries = sorted(terms.split("+"))
    assert sorted(prepared_of(model).terms) == entries
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["target_modules"] == sorted(b.module for b in biases)
    assert sorted(config["auto_mapping"]["beft_ext"]["terms"]) == entries
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert all(f"\n{entry} " in card for entry in entries)
    loaded = tiny(name)
    base = values(loaded)
    load_adapter(loaded, tmp_path / "adapter")
    close(logits(loaded), want)
    merge_adapter(loaded)
    loaded.save_pretrained(tmp_path / "merged")
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    close(logits(plain), want)
    unmerge_adapter(loaded)
    set_adapter(loaded, None)
    assert same(loaded, base)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "adapter")
    close(logits(theirs), want)


def test_a_gate_of_a_fused_projection(tmp_path):
    """The gate's half alone; PEFT adds the same vector; no plain Phi-3 has a place for it."""
    model, want = tuned("phi3", tmp_path, "mlp_gate@1")
    bias = next(t for n, t in load_file(tmp_path / WEIGHTS).items() if n.endswith("beft_bias"))
    assert bias.shape == (1, 96) and bias[0, :48].all() and not bias[0, 48:].any()
    other = tiny("phi3")
    load_adapter(other, tmp_path)
    close(logits(other), want)
    with pytest.raises(AdapterError, match="no flag that gives this projection one"):
        merge_adapter(model)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    close(logits(peft.PeftModel.from_pretrained(tiny("phi3"), tmp_path)), want)


def test_training_goes_on_only_in_the_layers_of_the_adapter(tmp_path):
    _, want = tuned("llama", tmp_path, "value@1")
    model = tiny("llama")
    prepare(model, "value@0")
    with pytest.raises(AdapterError, match="beyond the prepared biases"):
        load_adapter(model, tmp_path, trainable=True)
    restore(model)
    prepare(model, "value")
    load_adapter(model, tmp_path, trainable=True)
    close(logits(model), want)


def test_facts_are_of_norms_with_a_bias_and_of_projections_without_one():
    assert {"attention_norm", "mlp_norm"} <= {f.term for f in term_facts(tiny("bert"))}
    assert {"value", "mlp_gate"} <= {f.term for f in term_facts(tiny("llama"))}


@pytest.mark.parametrize("name", ["llama", "gemma", "mistral", "gpt-neo", "t5", "bert", "gpt2"])
def test_the_facts_of_a_term_are_what_happens(name, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for facts in term_facts(tiny(name)):
        model = tiny(name)
        prepared = prepare(model, facts.term)
        assert facts.added == bool(prepared.added)
        assert facts.elements == sum(b.width for b in prepared.biases)
        save_adapter(model, tmp_path)
        try:
            peft.PeftModel.from_pretrained(tiny(name), tmp_path)
            loads = True
        except TypeError:
            loads = False
        try:
            merge_adapter(model)
            merges = True
        except AdapterError:
            merges = False
        assert (facts.merges, facts.in_peft) == (merges, loads), facts


@pytest.mark.parametrize(
    ("name", "terms"),
    [("mistral", "value"), ("gptj", "value"), ("t5", "value"), ("gemma", "mlp_up")],
)
def test_a_family_without_a_place_for_the_bias_says_so(name, terms, tmp_path):
    model, want = tuned(name, tmp_path, terms)
    before, config = values(model), flags(model)
    with pytest.raises(AdapterError, match="its config has no flag"):
        merge_adapter(model)
    assert same(model, before) and flags(model) == config
    assert torch.equal(logits(model), want)


def test_no_adapter_comes_or_goes_under_a_tap(tmp_path):
    model = tiny("llama")
    with pytest.warns(BeftWarning, match="was added"):
        prepare(model, "value")
    save_adapter(model, tmp_path)
    restore(model)
    load_adapter(model, tmp_path)
    with Tap(model, find_biases(model)):
        for change in (set_adapter, load_adapter, delete_adapter, merge_adapter):
            arguments = {set_adapter: [None], load_adapter: [tmp_path]}.get(change, [])
            with pytest.raises(AdapterError, match="tapped already"):
                change(model, *arguments)
    set_adapter(model, None)


def test_merging_twice_and_unmerging_what_was_not_merged(tmp_path):
    _, want = tuned("llama", tmp_path)
    model = tiny("llama")
    base = values(model)
    with pytest.raises(AdapterError, match="nothing to merge"):
        merge_adapter(model)
    with pytest.raises(AdapterError, match="no adapter is merged"):
        unmerge_adapter(model)
    load_adapter(model, tmp_path)
    loaded = values(model)
    merge_adapter(model)
    for refused in (
        lambda: merge_adapter(model),
        lambda: load_adapter(model, tmp_path),
        lambda: set_adapter(model, None),
        lambda: prepare(model),
    ):
        with pytest.raises(ValueError, match="merged here"):
            refused()
    unmerge_adapter(model)
    assert same(model, loaded)
    close(logits(model), want)
    set_adapter(model, None)
    assert same(model, base)


def test_merged_training_leaves_a_plain_model(tmp_path):
    model, want = tuned("gpt2", tmp_path)
    merge_adapter(model)
    assert prepared_of(model) is None and all(p.requires_grad for p in model.parameters())
    assert not any(p._backward_hooks for p in model.parameters())
    assert torch.equal(logits(model), want)
    unmerge_adapter(model)
    assert prepared_of(model) is not None
    train(model, steps=1)


def test_the_card_shows_the_selection(tmp_path):
    model = tiny("bert")
    selection = select(model, [batch(seed=i) for i in range(3)])
    selection.save(tmp_path / "selection")
    prepare(model, selection.best)
    cards = []
    for source in (selection, tmp_path / "selection", tmp_path / "selection" / "selection.json"):
        save_adapter(model, tmp_path / "adapter", source)
        cards.append((tmp_path / "adapter" / "README.md").read_text())
    assert str(selection) in cards[0] and cards[0] == cards[1] == cards[2]
    with pytest.raises(AdapterError, match="not a selection"):
        save_adapter(model, tmp_path / "other", tmp_path / "adapter" / CONFIG)
    assert not (tmp_path / "other").exists()


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny("bert")
    prepared = prepare(model)
    save_adapter(model, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with torch.no_grad():
        model.get_parameter(prepared.biases[0].parameter)[3] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        save_adapter(model, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before


def unmapped(folder):
    """load_file maps the file that is about to be overwritten."""
    return {n: t.clone() for n, t in load_file(folder / WEIGHTS).items()}


def rewrite(folder, change):
    tensors = unmapped(folder)
    change(tensors, next(n for n in tensors if n.endswith("beft_bias")))
    save_file(tensors, folder / WEIGHTS)


def reconfigure(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def header(folder, length):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])


def outside(folder):
    target = folder.parent / "elsewhere.safetensors"
    (folder / WEIGHTS).rename(target)
    (folder / WEIGHTS).symlink_to(target)


def as_pickle(folder, name):
    torch.save(unmapped(folder), folder / name)
    if name != WEIGHTS:
        (folder / WEIGHTS).unlink()


HOSTILE = {
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 900), "not a whole safetensors file"),
    "empty": (lambda f: os.truncate(f / WEIGHTS, 0), "not a whole safetensors file"),
    "noise": (lambda f: (f / WEIGHTS).write_bytes(os.urandom(4096)), "not a whole safetensors"),
    "huge header": (lambda f: header(f, 2**62), "header"),
    "header past the end": (lambda f: header(f, 99_999), "header"),
    "pickle": (lambda f: as_pickle(f, "adapter_model.bin"), "pickle"),
    "pickle by another name": (lambda f: as_pickle(f, WEIGHTS), "not a whole safetensors file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model"),
    "a folder": (lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir()), "is no plain file"),
    "a pipe": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "is no plain file"),
    "out of the folder": (outside, "leads out of its folder"),
    "integers": (
        lambda f: rewrite(f, lambda t, n: t.update({n: t[n].int()})),
        "is I32: only F64",
    ),
    "NaN": (lambda f: rewrite(f, lambda t, n: t[n].fill_(float("nan"))), "NaN or infinite"),
    "infinite head": (
        lambda f: rewrite(
            f, lambda t, n: t["base_model.model.classifier.bias"].fill_(float("inf"))
        ),
        "NaN or infinite",
    ),
    "missing bias": (lambda f: rewrite(f, lambda t, n: t.pop(n)), "lacks .*beft_bias"),
    "missing head": (
        lambda f: rewrite(f, lambda t, n: t.pop("base_model.model.classifier.bias")),
        "lacks 'classifier.bias'",
    ),
    "no tensors": (lambda f: rewrite(f, lambda t, n: t.clear()), "lacks"),
    "width": (
        lambda f: rewrite(f, lambda t, n: t.update({n: torch.zeros(1, 64)})),
        r"has shape \(1, 64\), but BertFor.* needs \(1, 32\)",
    ),
    "other names": (
        lambda f: rewrite(f, lambda t, n: t.update({"../../x": torch.zeros(2)})),
        "not a tensor of a PEFT adapter",
    ),
    "a frozen weight": (
        lambda f: rewrite(
            f,
            lambda t, n: t.update(
                {"base_model.model.bert.pooler.dense.bias": torch.zeros(32)},
            ),
        ),
        "neither a bias nor in a head",
    ),
    "no module": (
        lambda f: rewrite(f, lambda t, n: t.update({n.replace(".0.", ".7."): t[n] + 1})),
        "another architecture",
    ),
    "no projection": (
        lambda f: rewrite(
            f, lambda t, n: t.update({"base_model.model.bert.beft_bias": torch.zeros(1, 32)})
        ),
        "takes no bias",
    ),
    "config not JSON": (lambda f: (f / CONFIG).write_bytes(b"\xff{"), "is not JSON"),
    "config too deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), "is not JSON"),
    "config too large": (lambda f: (f / CONFIG).write_text(" " * 2**21), "is larger"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "does not describe a BEFT"),
    "another method": (lambda f: reconfigure(f, peft_type="LORA"), "does not describe a BEFT"),
    "targets a number": (lambda f: reconfigure(f, target_modules=3), "must be a list"),
    "no config": (lambda f: (f / CONFIG).unlink(), "has no adapter_config"),
}


@pytest.fixture(scope="module")
def bert_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tuned("bert", folder)
    return folder


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_and_the_model_stays(case, bert_adapter, tmp_path):
    folder = Path(shutil.copytree(bert_adapter, tmp_path / "adapter"))
    spoil, message = HOSTILE[case]
    spoil(folder)
    model = tiny("bert")
    before = values(model)
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder)
    assert same(model, before)
    assert not [k for k in vars(model) if "beft" in k]


def test_a_head_of_any_size_without_bytes_behind_it_is_not_believed(bert_adapter, tmp_path):
    folder = Path(shutil.copytree(bert_adapter, tmp_path / "adapter"))
    rewrite(
        folder,
        lambda t, n: t.update({"base_model.model.classifier.weight": torch.empty(2**40, 0)}),
    )
    with pytest.raises(AdapterError, match="a weight without elements"):
        head_classes(folder)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    tuned("bert", tmp_path)
    config = tiny("bert").config
    for change, message in (
        ({"num_hidden_layers": 3}, "num_hidden_layers 2, but BertFor"),
        ({"hidden_size": 64}, "hidden_size 32, but"),
        ({"num_labels": 5}, r"'classifier\.\w+' has shape"),
    ):
        other = type(config)(**config.to_diff_dict() | change)
        model = hf.AutoModelForSequenceClassification.from_config(other)
        with pytest.raises(AdapterError, match=message):
            load_adapter(model, tmp_path)
    for model, message in ((tiny("roberta"), "model_type 'bert'"), (tiny("bert").bert, "bias for")):
        with pytest.raises(AdapterError, match=message):
            load_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="no adapter folder"):
        load_adapter(tiny("bert"), tmp_path / "nothing")


def test_peft_adapter_of_fewer_layers_is_refused(tmp_path):
    tuned("bert", tmp_path)
    reconfigure(tmp_path, auto_mapping=None, target_modules=["value"])
    config = hf.BertConfig(**tiny("bert").config.to_diff_dict() | {"num_hidden_layers": 3})
    with pytest.raises(AdapterError, match="another number of layers"):
        load_adapter(hf.AutoModelForSequenceClassification.from_config(config), tmp_path)


@pytest.mark.parametrize("renamed", range(4))
def test_a_kill_between_the_files_never_mixes_two_adapters(tmp_path, monkeypatch, renamed):
    tuned("bert", tmp_path, terms="query")
    model = tiny("bert")
    prepare(model, "value")
    train(model, lr=1e-2)
    rename, left = Path.replace, iter(range(renamed))

    def killing(path, target):
        if next(left, None) is None:
            raise KeyboardInterrupt  # stands for a kill
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killing)
        if renamed < 3:
            with pytest.raises(KeyboardInterrupt):
                save_adapter(model, tmp_path)
        else:
            save_adapter(model, tmp_path)
    fresh = tiny("bert")
    if renamed == 3:
        load_adapter(fresh, tmp_path)
        close(logits(fresh), logits(model))
    else:
        before = fresh.state_dict()
        with pytest.raises(AdapterError, match="cut off while being saved"):
            load_adapter(fresh, tmp_path)
        assert same(fresh, before)
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    close(logits(fresh), logits(model))


def test_a_failure_while_writing_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    expected = tuned("bert", tmp_path, terms="query")[1]
    model = tiny("bert")
    prepare(model, "value")

    def full(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="no space"):
            save_adapter(model, tmp_path)
    fresh = tiny("bert")
    load_adapter(fresh, tmp_path)
    close(logits(fresh), expected)


def bits(data, chance, count):
    """Copies of ``data`` with one bit turned over each."""
    for place in chance.sample(range(8 * len(data)), count):
        bad = bytearray(data)
        bad[place // 8] ^= 1 << place % 8
        yield bytes(bad)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_no_flipped_bit_passes(file, bert_adapter, tmp_path):
    folder = Path(shutil.copytree(bert_adapter, tmp_path / "adapter"))
    model = tiny("bert")
    before = values(model)
    for bad in bits((folder / file).read_bytes(), random.Random(0), 50):
        (folder / file).write_bytes(bad)
        with pytest.raises(AdapterError):
            load_adapter(model, folder)
    assert same(model, before)


def test_weights_and_config_of_two_adapters_do_not_go_together(tmp_path):
    tuned("bert", tmp_path / "a")
    tuned("bert", tmp_path / "b", lr=2e-2)
    shutil.copy(tmp_path / "a" / CONFIG, tmp_path / "b" / CONFIG)
    with pytest.raises(AdapterError, match="do not belong together"):
        load_adapter(tiny("bert"), tmp_path / "b")


def test_an_adapter_from_before_there_were_digests_loads(tmp_path):
    _, want = tuned("bert", tmp_path)
    rewrite(tmp_path, lambda t, n: None)
    config = json.loads((tmp_path / CONFIG).read_text())
    for key in ("sha256", "weights"):
        config["auto_mapping"]["beft_ext"].pop(key)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = tiny("bert")
    load_adapter(model, tmp_path)
    close(logits(model), want)


def test_what_peft_trains_on_and_saves_again_we_load(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    tuned("bert", tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path / "ours", is_trainable=True)
    train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny("bert")
    load_adapter(model, tmp_path / "theirs")
    close(logits(model), logits(theirs))


def test_a_head_that_holds_targets_is_no_damage(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.BeftConfig(target_modules="all-linear", task_type="SEQ_CLS")
    theirs = peft.get_peft_model(tiny("roberta"), config)
    train(theirs)
    theirs.save_pretrained(tmp_path)
    model = tiny("roberta")
    load_adapter(model, tmp_path)
    close(logits(model), logits(theirs))


def causal(tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(**sizes, vocab_size=64, intermediate_size=48, tie_word_embeddings=tied)
    return hf.LlamaForCausalLM(config).eval()


def test_a_tied_head_does_not_take_a_value_of_its_own(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.BeftConfig(target_modules=["v_proj"], modules_to_save=["lm_head"])
    ids = batch()["input_ids"]
    for tied in (True, False):
        theirs = peft.get_peft_model(causal(tied), config)
        for p in theirs.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.3)
        theirs.save_pretrained(tmp_path / str(tied))
        model = causal(tied)
        before = values(model)
        if tied:
            with pytest.raises(AdapterError, match="tied to 'model"):
                load_adapter(model, tmp_path / str(tied))
            assert same(model, before)
        else:
            load_adapter(model, tmp_path / str(tied))
            close(model(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("where", ["bias", "head"])
def test_what_the_dtype_cannot_hold_is_refused(where, bert_adapter, tmp_path):
    folder = Path(shutil.copytree(bert_adapter, tmp_path / "adapter"))
    key = "base_model.model.classifier.bias"
    rewrite(folder, lambda t, n: t[n if where == "bias" else key].view(-1)[0].fill_(1e6))
    half, model = tiny("bert").half(), tiny("bert")
    load_adapter(half, bert_adapter, "fine")
    before = values(half)
    with pytest.raises(AdapterError, match=r"beyond what torch.float16 can hold"):
        load_adapter(half, folder)
    assert same(half, before)
    set_adapter(half, None)
    prepare(half, "value")
    before = values(half)
    with pytest.raises(AdapterError, match=r"beyond what torch.float16 can hold"):
        load_adapter(half, folder, trainable=True)
    assert same(half, before)
    load_adapter(model, folder)


def test_a_difference_is_added_before_it_is_rounded(tmp_path):
    """A hair below half a step of bf16: rounded by itself it is half a step, which rounds up."""
    model = tiny("bert").bfloat16()
    prepared = prepare(model, "value")
    save_adapter(model, tmp_path)
    difference = 2**-8 - 5e-6
    rewrite(tmp_path, lambda t, n: [v.fill_(difference) for k, v in t.items() if "beft_" in k])
    again = tiny("bert").bfloat16()
    with torch.no_grad():
        for bias in prepared.biases:
            again.get_parameter(bias.parameter).fill_(1 + 2**-7)
    load_adapter(again, tmp_path)
    total = 1 + 2**-7 + float(torch.tensor(difference))
    want = torch.tensor(total, dtype=torch.float64).bfloat16()
    for bias in prepared.biases:
        assert again.get_parameter(bias.parameter).eq(want).all()


def test_load_state_dict_under_an_active_adapter_is_refused(bert_adapter):
    model, other = tiny("bert"), tiny("bert", seed=1)
    load_adapter(model, bert_adapter)
    active = values(model)
    for part in (model, copy.deepcopy(model), model.bert.encoder.layer[0]):
        with pytest.raises(AdapterError, match="set_adapter"):
            part.load_state_dict(part.state_dict())
    assert same(model, active)
    set_adapter(model, None)
    model.load_state_dict(other.state_dict())
    load_adapter(other, bert_adapter)
    set_adapter(model, "default")
    assert same(model, values(other))
    set_adapter(model, None)
    assert same(model, values(tiny("bert", seed=1)))
    assert not any(m._load_state_dict_pre_hooks for m in model.modules())


def test_a_compiled_model_is_the_model_inside(tmp_path):
    model = tiny("bert")
    compiled = torch.compile(model)
    prepare(compiled, "value")
    train(model)
    want = logits(model)
    save_adapter(compiled, tmp_path)
    for wrap in (lambda m: m, torch.compile, torch.nn.DataParallel):
        plain = tiny("bert")
        base = values(plain)
        wrapped = wrap(plain)
        assert load_adapter(wrapped, tmp_path) is wrapped
        close(logits(plain), want)
        assert merge_adapter(wrapped) is wrapped
        unmerge_adapter(wrap(plain))
        set_adapter(wrap(plain), None)
        assert same(plain, base)
    restore(compiled)
    assert prepared_of(model) is None


def test_a_model_that_peft_wrapped_or_that_is_offloaded_is_refused(bert_adapter, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    wrapped = peft.get_peft_model(tiny("bert"), peft.BeftConfig(target_modules=["value"]))
    for model, message in ((wrapped, "PEFT"), (tiny("bert").to("meta"), "no offload holds")):
        for call in (
            lambda m: prepare(m),
            lambda m: load_adapter(m, bert_adapter),
            lambda m: save_adapter(m, tmp_path),
            lambda m: set_adapter(m, None),
            merge_adapter,
        ):
            with pytest.raises((AdapterError, PrepareError), match=message):
                call(model)


@pytest.mark.parametrize("labels", [2, 3, 100])
def test_the_classes_of_a_head_of_two_layers(labels, tmp_path):
    config = hf.RobertaConfig(**tiny("roberta").config.to_diff_dict() | {"num_labels": labels})
    model = hf.AutoModelForSequenceClassification.from_config(config)
    prepare(model)
    save_adapter(model, tmp_path)
    assert head_classes(tmp_path) == labels


def test_only_a_constant_number_of_walks_over_the_modules(tmp_path, monkeypatch):
    """Oracle: the number of calls does not grow with the number of biases."""
    walks = []
    for layers in (2, 6):
        config = hf.BertConfig(**tiny("bert").config.to_diff_dict() | {"num_hidden_layers": layers})
        model = hf.AutoModelForSequenceClassification.from_config(config)
        prepare(model, ("query", "value"))
        count, walk = [0], torch.nn.Module.named_modules

        def counted(self, *args, _root=model, _count=count, _walk=walk, **options):
            _count[0] += self is _root
            return _walk(self, *args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.Module, "named_modules", counted)
            save_adapter(model, tmp_path / str(layers))
        walks.append(count[0])
    assert walks[0] == walks[1]


def test_a_head_of_three_classes_does_not_go_into_one_of_two(tmp_path):
    """LLaMA's head has no bias: its weight alone says how many classes there are."""
    config = hf.LlamaConfig(**tiny("llama").config.to_diff_dict() | {"num_labels": 3})
    model = hf.AutoModelForSequenceClassification.from_config(config)
    prepare(model)
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match=r"'score.weight' has shape \(3, 32\)"):
        load_adapter(tiny("llama"), tmp_path)
