"""Per-example Fisher is of each example's own loss, whatever the batch's loss is a mean over."""

import math

import pytest
import torch
import transformers as hf
from conftest import CONFIGS, T5, batch

from beft_ext import find_biases, select
from beft_ext.loss import examples_and_divisor
from beft_ext.models import add_bias

IGNORE = -100
FP32 = 1e-6  # transformers takes a causal model's logits to fp32: 2^-24, over a few operations


def made(kind, config):
    """In float64, without dropout, all biases non-zero."""
    torch.manual_seed(0)
    config.num_labels = 3
    model = kind(config).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def t5():
    model = made(
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1),
    )
    for name, module in model.named_modules():
        if name.endswith(".v"):
            torch.nn.init.normal_(add_bias(module), std=0.1)
    return model


def spelled():
    """Labels over tokens, each row with another number of them; the first one counts in some."""
    inputs = batch(rows=5, tokens=9)
    labels = inputs["input_ids"].clone()
    for row, left_out in enumerate(([0, 1, 2], [], [5], [0, 8], [3, 4])):
        labels[row, left_out] = IGNORE
    return inputs | {"labels": labels}


def choices():
    inputs = batch(rows=12, tokens=7)
    inputs = {k: v.view(4, 3, 7) for k, v in inputs.items() if k != "labels"}
    return inputs | {"labels": torch.tensor([0, 2, 1, 1])}


CASES = {
    "causal": (lambda: made(hf.OPTForCausalLM, CONFIGS["opt"]()), spelled),
    "encoder-decoder": (t5, spelled),
    "masked": (lambda: made(hf.BertForMaskedLM, CONFIGS["bert"]()), spelled),
    "multiple choice": (lambda: made(hf.BertForMultipleChoice, CONFIGS["bert"]()), choices),
}


def alone(model, inputs, row):
    """Example ``row``'s loss: summed over its tokens where labels are tokens."""
    one = {k: v[row : row + 1] for k, v in inputs.items()}
    logits, labels = model(**one).logits, one["labels"]
    if labels.ndim == 1:
        return torch.nn.functional.cross_entropy(logits, labels)
    if isinstance(model, hf.OPTForCausalLM):
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = -logits.log_softmax(-1)[0].gather(1, labels[0].clamp(min=0)[:, None])[:, 0]
    return each[labels[0] != IGNORE].sum()


@pytest.mark.parametrize("case", CASES)
def test_fisher_equals_a_batch_of_one_loop_in_float64(case):
    model, inputs = CASES[case][0](), CASES[case][1]()
    biases = find_biases(model)
    # A step of rate almost zero: the statistics are those of the values at hand.
    found = select(model, [inputs], "example_fisher", steps=1, lr=1e-30)
    rows = len(inputs["labels"])
    expected = {}
    for row in range(rows):
        model.requires_grad_(True)
        names = dict.fromkeys(b.parameter for b in biases)
        loss = alone(model, inputs, row)
        grads = torch.autograd.grad(loss, [model.get_parameter(n) for n in names])
        of = dict(zip(names, grads, strict=True))
        for bias in biases:
            square = float(bias.read(of[bias.parameter]).square().mean())
            terms = expected.setdefault(bias.term, {})
            terms[bias.layer] = terms.get(bias.layer, 0.0) + square / rows
    largest = max(max(terms.values()) for terms in expected.values())
    for term, values in found.per_layer["example_fisher"].items():
        want = [expected[term][layer] for layer in sorted(expected[term])]
        # Of a dead term there is only rounding noise, of the size FP32 before it is squared.
        assert values == pytest.approx(want, rel=2 * FP32, abs=FP32**2 * largest), term


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_sum_over_examples_over_the_divisor(case):
    model, inputs = CASES[case][0](), CASES[case][1]()
    count, divisor = examples_and_divisor(model, inputs)
    total = sum(float(alone(model, inputs, row).detach()) for row in range(count))
    assert math.isclose(float(model(**inputs).loss.detach()), total / divisor, rel_tol=FP32)


def test_numbers_as_labels_are_a_mean_over_examples():
    inputs = batch(rows=4) | {"labels": torch.randn(4, 3)}
    assert examples_and_divisor(torch.nn.Identity(), inputs) == (4, 4)
    assert examples_and_divisor(torch.nn.Identity(), {"input_ids": torch.ones(6, 2)}) == (6, 6)
