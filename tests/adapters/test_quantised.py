"""Quantised bases: torchao's weight-only int8 on the CPU, from the tap to the merged adapter."""

import pytest
import torch
from conftest import batch, close, logits, tiny, values

from beft_ext import (
    AdapterError,
    BiasAdamW,
    PrepareError,
    Tap,
    find_biases,
    load_adapter,
    merge_adapter,
    prepare,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

FAMILIES = ["bert", "opt", "gpt-neox", "llama"]


def quantised(name, dtype=torch.float32):
    """Every linear layer of the base model as int8 with a scale for each output."""
    model = tiny(name).to(dtype)
    quantization.quantize_(model.base_model, quantization.Int8WeightOnlyConfig())
    return model


def tuned(name, terms="value", dtype=torch.float32):
    model = quantised(name, dtype)
    prepared = prepare(model, terms)
    optimizer = BiasAdamW(model, lr=1e-2)
    for seed in range(3):
        optimizer.zero_grad()
        model(**batch(seed=seed)).loss.backward()
        optimizer.step()
    return model, prepared


def floats(model):
    """The state but for the quantised tensors, which know no comparison."""
    return {n: t for n, t in values(model).items() if type(t) is torch.Tensor}


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_chosen_biases_and_the_head_train(name):
    fresh, (model, prepared) = quantised(name), tuned(name)
    before, after = floats(fresh), floats(model)
    names = {b.parameter for b in prepared.biases} | set(prepared.head)
    for own in before:
        assert torch.equal(before[own], after[own]) == (own not in names)
    projection = model.get_submodule(prepared.biases[0].module)
    assert type(projection.weight) is quantization.Int8Tensor


@pytest.mark.parametrize("name", ["bert", "opt", "gpt-neox"])
def test_the_tap_gives_autograds_gradients(name):
    model = quantised(name)
    biases = find_biases(model)
    model.requires_grad_(False)
    own = {b.parameter: model.get_parameter(b.parameter) for b in biases}
    for parameter in own.values():
        parameter.requires_grad_(True)
    model(**batch()).loss.backward()
    expected = {n: p.grad.clone() for n, p in own.items()}
    with Tap(model, biases) as tap:
        tap.step(4, 4.0)
        model(**batch()).loss.backward()
        for bias, leaf in tap.leaves():
            close(leaf.grad, bias.view(expected[bias.parameter]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_goes_to_another_quantised_base_and_back(name, dtype, tmp_path):
    want = logits(tuned(name, dtype=dtype)[0])
    save_adapter(tuned(name, dtype=dtype)[0], tmp_path)
    model = quantised(name, dtype)
    base = logits(model)
    load_adapter(model, tmp_path)
    close(logits(model), want)
    merge_adapter(model)
    close(logits(model), want)
    unmerge_adapter(model)
    set_adapter(model, None)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", ["bert", "opt", "llama"])
def test_peft_loads_it_on_a_quantised_base(name, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, _ = tuned(name)
    save_adapter(model, tmp_path)
    close(logits(peft.PeftModel.from_pretrained(quantised(name), tmp_path)), logits(model))


def test_a_value_bias_folds_into_a_quantised_output():
    model, _ = tuned("gpt-neo")
    want = logits(model)
    merge_adapter(model)
    close(logits(model), want)


def test_a_quantised_head_is_refused_and_the_model_stays(tmp_path):
    save_adapter(tuned("bert")[0], tmp_path)
    model = tiny("bert")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    before = floats(model)
    with pytest.raises(PrepareError, match=r"'classifier.weight' is quantised \(Int8Tensor\)"):
        prepare(model)
    with pytest.raises(AdapterError, match=r"'classifier.weight' .* is quantised"):
        load_adapter(model, tmp_path)
    after = floats(model)
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_adapter_of_a_quantised_base_fits_the_base_in_full_precision(name, tmp_path):
    model, _ = tuned(name)
    save_adapter(model, tmp_path)
    plain = tiny(name)
    base = logits(plain)
    load_adapter(plain, tmp_path)
    moved = (logits(plain) - base).abs().max()
    assert (logits(plain) - logits(model)).abs().max() < moved / 2
