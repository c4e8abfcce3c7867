"""Models that Accelerate offloads: the same results to the bit, and what trains really does."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import CONFIGS, batch, logits, tiny
from torch import nn

from beft_ext import (
    AdapterError,
    BiasAdamW,
    OptimizerError,
    PrepareError,
    Recipe,
    TuningError,
    load_adapter,
    measure_gains,
    merge_adapter,
    prepare,
    restore,
    save_adapter,
    select,
    set_adapter,
    tune,
    unmerge_adapter,
)
from beft_ext.commands.memory import peak_bytes
from beft_ext.errors import BeftWarning
from beft_ext.models import find_projections
from beft_ext.models.offload import device_of, is_offloaded, value_of

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

CPU = torch.device("cpu")
FAMILIES = ["bert", "opt", "gpt2", "llama"]  # head; decoders with biases, one fused; none at all


def from_host(model, folder):
    """Every tensor lies on the host, in a map beside the model."""
    return accelerate.cpu_offload(model, CPU)


def from_files(model, folder):
    """Every tensor is a file."""
    return accelerate.disk_offload(model, folder, CPU)


def with_buffers(model, folder):
    """Buffers too."""
    return accelerate.disk_offload(model, folder, CPU, offload_buffers=True)


def half(model, folder):
    """transformers keeps half of the bytes in memory, and reads the rest from the model's file."""
    model.save_pretrained(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    return from_folder(type(model), folder, {"cpu": max(size, 2 * largest(model))})


def largest(model):
    """Bytes of the largest layer."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = [*(layer for own in lists for layer in own), model.get_input_embeddings()]
    return max(sum(p.numel() * 4 for p in layer.parameters()) for layer in layers)


def from_folder(kind, folder, memory):
    found = kind.from_pretrained(folder, device_map="sequential", max_memory=memory)
    assert "disk" in found.hf_device_map.values()
    return found


def dispatched(model, folder):
    """Accelerate itself loads the files that transformers wrote."""
    parts = dict.fromkeys([n for n, _ in model.named_children()], "cpu")
    parts[next(iter(parts))] = "disk"
    return spread(model, folder, parts)


def spread(model, folder, parts, **options):
    model.save_pretrained(folder / "model")
    with accelerate.init_empty_weights():
        empty = type(model)(copy.deepcopy(model.config))
    options["offload_folder"] = str(folder / "away")
    options["no_split_module_classes"] = model._no_split_modules
    found = accelerate.load_checkpoint_and_dispatch(empty, str(folder / "model"), parts, **options)
    assert "disk" in found.hf_device_map.values()
    return found.eval()


# Every family by files, and every way with one that has a head and biases.
CASES = [(from_files, name) for name in FAMILIES]
CASES += [(way, "bert") for way in (from_host, with_buffers, half, dispatched)]
CASES += [(half, "llama")]
PAIRS = pytest.mark.parametrize("way, name", CASES, ids=[f"{w.__name__}-{n}" for w, n in CASES])


def offloaded(way, name, folder):
    (folder / "offload").mkdir()
    model = way(tiny(name), folder / "offload")
    assert is_offloaded(model) and device_of(model) == CPU
    return model


def loader(rows=6, count=4):
    return [batch(rows, seed=i) for i in range(count)]


def away(model):
    return {n for n, p in model.named_parameters() if p.is_meta}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def trained(model, terms="value", folder=None, evaluate=None):
    """Tuned for two epochs, dropout and all, and in evaluation mode again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BeftWarning)
        prepared = prepare(model, terms)
    tune(model, loader(), evaluate, folder, Recipe(epochs=2, lr=1e-2), save_every=3)
    model.eval()
    return prepared


@PAIRS
def test_gains_and_selection_are_those_of_the_plain_model(way, name, tmp_path):
    model, plain = offloaded(way, name, tmp_path), tiny(name)
    before, want = away(model), logits(plain)
    assert torch.equal(logits(model), want)
    assert find_projections(model) == find_projections(plain)
    found, expected = measure_gains(model, loader()), measure_gains(plain, loader())
    assert found.values == expected.values and found.dead == expected.dead
    for term, parts in expected.evidence.grams.items():
        same(found.evidence.grams[term], parts)
    one, other = (select(m, loader(), seed=3) for m in (model, plain))
    assert repr(one.scores) == repr(other.scores) and one.losses == other.losses
    same(one.current, other.current)
    assert away(model) == before and torch.equal(logits(model), want)
    assert all(p.requires_grad for p in model.parameters())


@PAIRS
def test_what_trains_ends_in_the_same_bits(way, name, tmp_path):
    model, plain = offloaded(way, name, tmp_path), tiny(name)
    before = away(model)
    for m, folder in ((model, "one"), (plain, "other")):
        trained(m, "value", tmp_path / folder, loader(count=1))
        save_adapter(m, tmp_path / folder)
    names = {n for n, p in plain.named_parameters() if p.requires_grad}
    assert away(model) == before - names
    same({n: model.get_parameter(n) for n in names}, {n: plain.get_parameter(n) for n in names})
    assert torch.equal(logits(model), logits(plain))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "other" / weights).read_bytes()
    restore(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    for n in names & {n for n, _ in model.named_parameters()}:
        assert torch.equal(value_of(model, n), plain.get_parameter(n))


@PAIRS
def test_an_adapter_is_loaded_merged_and_taken_off_again(way, name, tmp_path):
    trained(first := tiny(name), "value+mlp_up")
    save_adapter(first, tmp_path / "adapter")
    model, plain = offloaded(way, name, tmp_path), tiny(name)
    before, base = away(model), logits(plain)
    for m in (model, plain):
        load_adapter(m, tmp_path / "adapter")
    want = logits(plain)
    assert not torch.equal(want, base) and torch.equal(logits(model), want)
    set_adapter(model, None)
    assert away(model) == before and torch.equal(logits(model), base)
    set_adapter(model, "default")
    merge_adapter(model).save_pretrained(tmp_path / "merged", max_shard_size="20KB")
    merge_adapter(plain)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    again = type(plain).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), want) and torch.equal(logits(model), want)
    same(again.state_dict(), plain.state_dict())
    unmerge_adapter(model)
    set_adapter(model, None)
    assert torch.equal(logits(model), base)


def test_a_value_bias_folds_into_an_offloaded_output(tmp_path):
    model, plain = offloaded(from_files, "gpt-neo", tmp_path), tiny("gpt-neo")
    for m in (model, plain):
        trained(m)
        merge_adapter(m)
    assert torch.equal(logits(model), logits(plain))
    unmerge_adapter(model)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("way", [from_host, from_files, half])
def test_untrained_biases_go_back_and_trained_ones_stay(way, tmp_path):
    model, plain = offloaded(way, "bert", tmp_path), tiny("bert")
    before = away(model)
    prepare(model, "value")
    restore(model)
    assert away(model) == before
    prepare(model, "value")
    name = "bert.encoder.layer.0.attention.self.value.bias"
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    restore(model)
    assert before - away(model) <= {name}
    assert torch.equal(value_of(model, name), plain.get_parameter(name) + 1)
    assert not torch.equal(logits(model), logits(plain))


def test_a_trained_bias_outlives_accelerates_hooks(tmp_path):
    model = from_host(tiny("bert"), tmp_path)
    prepared = trained(model)
    want = logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not is_offloaded(model) and torch.equal(logits(model), want)
    assert model.get_parameter(prepared.biases[0].parameter).requires_grad


def test_a_copy_of_a_prepared_model_trains_by_itself(tmp_path):
    model = from_host(tiny("bert"), tmp_path)
    prepare(model, "value")
    want, twin = logits(model), copy.deepcopy(model)
    tune(twin, loader(), recipe=Recipe(epochs=1, lr=1e-2))
    assert torch.equal(logits(model), want) and not torch.equal(logits(twin), want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_holds_a_part_of_the_weights(tmp_path, checkpointing):
    """A model twice as large as what is allowed: selected on, tuned, saved and merged."""
    config = hf.LlamaConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = hf.AutoModelForSequenceClassification.from_config(config).eval()
    size = sum(p.numel() * 4 for p in plain.parameters())
    model = spread(plain, tmp_path, "sequential", max_memory={"cpu": size // 2})
    resident = sum(p.numel() * 4 for p in model.parameters() if not p.is_meta)
    rows = [batch(2, 4, seed=i) for i in range(3)]
    allowed = size // 2
    if checkpointing:  # a layer that is computed anew keeps its weights until it is through
        allowed = size * 3 // 4
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def peak(work):
        return resident + peak_bytes(work, CPU)

    assert measure_gains(model, rows).values == measure_gains(plain, rows).values
    assert peak(lambda: measure_gains(model, rows)) < allowed
    assert peak(lambda: select(model, rows)) < allowed
    recipe = Recipe(epochs=1, lr=1e-2)
    for m in (plain, model):
        with pytest.warns(BeftWarning, match="so one was added"):
            prepared = prepare(m, "value")
    assert peak(lambda: tune(model, rows, recipe=recipe)) < allowed
    tune(plain, rows, recipe=recipe)
    assert torch.equal(logits(model), logits(plain))
    assert peak(lambda: save_adapter(model, tmp_path / "adapter")) < allowed
    merge_adapter(model)
    folder = tmp_path / "merged"
    assert peak(lambda: model.save_pretrained(folder, max_shard_size=size // 8)) < allowed
    again = type(plain).from_pretrained(folder).eval()
    assert torch.equal(logits(again), logits(plain))
    if not checkpointing:  # without what reads weights again, a step keeps all of them
        unmerge_adapter(model)
        for handle in prepared.again:
            handle.remove()
        assert peak(lambda: model(**rows[0]).loss.backward()) > size * 3 // 4


def test_what_cannot_be_done_is_said(tmp_path):
    model = from_host(tiny("bert"), tmp_path)
    with pytest.raises(OptimizerError, match=r"'bert.* is offloaded and cannot train: prepare"):
        BiasAdamW(model)
    prepare(model, "value")
    for recipe in (Recipe(compile=True), Recipe(graphs=True)):
        with pytest.raises(TuningError, match="offloaded, which neither compile nor graphs"):
            tune(model, loader(), recipe=recipe)
    with torch.device("meta"):
        empty = hf.AutoModelForSequenceClassification.from_config(CONFIGS["bert"]())
    with pytest.raises(PrepareError, match="on the meta device, and no offload holds its value"):
        prepare(empty)
    with pytest.raises(AdapterError, match="on the meta device, and no offload holds its value"):
        load_adapter(empty, Path(tmp_path))
