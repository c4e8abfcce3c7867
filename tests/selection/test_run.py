"""The training run of a selection against torch's own AdamW, in float64, step by step."""

import itertools
import math
import re

import pytest
import torch
import transformers as hf
from conftest import MLP, SIZES, batch, tiny

from beft_ext import SelectionError, find_biases, select
from beft_ext.models import BiasMap, head_parameters
from beft_ext.selection import dead_terms

TERMS = ["query", "value", "mlp_up"]
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def quiet(**dropout):
    """A BERT in float64, by default without dropout, with biases that are not zero."""
    torch.manual_seed(0)
    config = hf.BertConfig(**SIZES, **MLP, **(QUIET | dropout))
    model = hf.BertForSequenceClassification(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batches():
    """Three, the last one smaller."""
    return [batch(seed=0), batch(seed=1), batch(rows=3, seed=2)]


def parameters(model):
    return {b.name: model.get_parameter(b.parameter) for b in find_biases(model) if b.term in TERMS}


def trained(model, rates, weight_decay, max_norm):
    """By torch alone: losses, each step's clipped gradients, and the values at the end."""
    biases, head = parameters(model), head_parameters(model)
    every = [*biases.values(), *head]
    optimizer = torch.optim.AdamW(every, weight_decay=weight_decay)
    losses, grads = [], []
    model.requires_grad_(False)
    for p in every:
        p.requires_grad_(True)
    for inputs, rate in zip(itertools.cycle(batches()), rates, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, max_norm)
        losses.append(float(loss.detach()))
        grads.append({n: p.grad.clone() for n, p in biases.items()})
        optimizer.step()
    return losses, grads, {n: p.detach() for n, p in biases.items()}


@pytest.mark.parametrize("max_norm", [0.05, 0.0])
def test_it_is_torchs_training_with_warmup_decay_and_clipping(max_norm):
    """Clipped to 0 is not clipped at all."""
    options = {"weight_decay": 0.1, "warmup": 0.5, "max_grad_norm": max_norm}
    found = select(quiet(), batches(), terms=TERMS, lr=1e-2, epochs=2, **options)
    rates = [1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2, 1e-2]
    losses, grads, values = trained(quiet(), rates, 0.1, max_norm or math.inf)
    assert found.losses == pytest.approx(losses, rel=1e-6)
    for name, value in values.items():
        # Each step's rate and the clipping are rounded to single precision on their way.
        torch.testing.assert_close(found.current[name].view(-1), value, rtol=1e-5, atol=1e-7)
    for term in TERMS:
        per_layer = [
            torch.stack([g[f"{layer}.{term}"].square().mean() for g in grads]).mean()
            for layer in range(2)
        ]
        want = float(torch.stack(per_layer).mean())
        assert found.scores["fisher"][term] == pytest.approx(want, rel=1e-4)


def test_fisher_of_examples_is_a_mean_over_examples_whatever_the_batches():
    model = quiet()
    found = select(model, batches(), terms=TERMS, lr=1e-12)
    squares = {}
    for inputs in batches():
        for i in range(len(inputs["labels"])):
            loss = model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss
            biases = parameters(model)
            grads = torch.autograd.grad(loss, list(biases.values()))
            for name, grad in zip(biases, grads, strict=True):
                squares[name] = squares.get(name, 0.0) + float(grad.square().mean()) / 11
    for term in TERMS:
        want = (squares[f"0.{term}"] + squares[f"1.{term}"]) / 2
        assert found.scores["example_fisher"][term] == pytest.approx(want, rel=1e-4)


def test_the_seed_decides_and_nothing_outside():
    def losses(outside, seed):
        model = quiet(hidden_dropout_prob=0.3)
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        found = select(model, batches(), terms=TERMS, seed=seed).losses
        assert torch.equal(torch.get_rng_state(), before)
        return found

    assert losses(1, seed=3) == losses(2, seed=3) != losses(1, seed=4)


def test_dropout_is_on_while_it_trains():
    still = [float(quiet()(**inputs).loss.detach()) for inputs in batches()]
    model = quiet(hidden_dropout_prob=0.5)
    found = select(model, batches(), terms=TERMS, lr=1e-12).losses
    assert all(abs(a - b) > 1e-6 for a, b in zip(still, found, strict=True))


def test_gradients_and_buffers_come_back():
    model = quiet()
    model.register_buffer("forwards", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, _: module.forwards.add_(1) is None or None)
    held = {}
    for name, parameter in model.named_parameters():
        parameter.grad = held[name] = torch.full_like(parameter, 0.5)
    select(model, batches(), terms=TERMS)
    assert float(model.forwards) == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is held[name] and bool((parameter.grad == 0.5).all())


def test_a_half_precision_model_moves_by_less_than_its_own_spacing():
    found = select(tiny("bert").bfloat16(), batches(), terms=TERMS, lr=1e-6)
    for term in TERMS:
        # Three steps of AdamW, each at most the rate where the gradient keeps its sign.
        assert 0 < found.scores["magnitude"][term] < 4e-6


def test_angles_above_90_degrees_are_listed():
    model = quiet()
    with torch.no_grad():
        for parameter in parameters(model).values():
            parameter.mul_(1e-4)
    found = select(model, batches(), terms=TERMS, lr=1e-2)
    scores = found.per_layer["beft"]
    wide = {f"{i}.{t}" for t in TERMS for i in range(2) if scores[t][i] > 1}
    assert wide and set(found.obtuse) == wide


def test_a_term_that_lives_in_one_layer_is_not_dead():
    model = tiny("qwen2")
    with torch.no_grad():  # no value, so nothing that the last layer's query and key could change
        attention = model.base_model.layers[-1].self_attn
        attention.v_proj.weight.zero_()
        attention.v_proj.bias.zero_()
    assert dead_terms(model, find_biases(model), lambda: model(**batch())) == []


def test_a_loader_is_read_again_where_the_run_is_longer():
    losses = select(quiet(), batches(), terms=TERMS, lr=1e-12, steps=7).losses
    assert losses == pytest.approx([losses[0], losses[1], losses[2]] * 2 + [losses[0]], rel=1e-6)
    assert len(select(quiet(), batches(), terms=TERMS, epochs=2).losses) == 6
    once = select(quiet(), iter(batches()), "beft", terms=TERMS, steps=3, lr=1e-12).losses
    assert once == losses[:3]


def test_a_loader_that_cannot_be_read_again_is_named():
    with pytest.raises(SelectionError, match="the loader ran dry: pass one that can be read again"):
        select(quiet(), iter(batches()), "beft", terms=TERMS, steps=4)
    with pytest.raises(SelectionError, match=r"a loader without a length needs steps=\.\.\."):
        select(quiet(), iter(batches()), "beft", terms=TERMS)


def test_candidates_are_the_given_biases_and_the_given_terms_of_them():
    model = quiet()
    first = BiasMap([b for b in find_biases(model) if b.layer == 0])
    found = select(model, batches(), biases=first, terms=["value", "mlp_up"])
    assert set(found.initial) == {"0.value", "0.mlp_up"}
    assert all(len(row) == 1 for row in found.per_layer["beft"].values())
    only = BiasMap([b for b in first if b.term == "value"])
    assert set(select(model, batches(), biases=only).initial) == {"0.value"}


def test_progress_shows_the_loss_and_who_leads(capsys, monkeypatch):
    """Every ten steps, and it changes nothing."""
    monkeypatch.setattr("beft_ext.progress.FIRST", 0.0)
    monkeypatch.setattr("beft_ext.progress.EVERY", 0.0)
    silent = select(quiet(), batches(), "beft", terms=TERMS, steps=10, lr=1e-2)
    assert capsys.readouterr().err == ""
    found = select(quiet(), batches(), "beft", terms=TERMS, steps=10, lr=1e-2, progress=True)
    shown = capsys.readouterr().err
    last = shown.splitlines()[-1]
    assert re.match(r"select: 10 of 10, \d+ s, ", last)
    assert last.endswith(f"loss {found.losses[-1]:.3f}, leading {found.best}")
    assert found.scores == silent.scores
    select(quiet(), batches(), terms=TERMS, steps=9, lr=1e-2, progress=True)
    assert "leading" not in capsys.readouterr().err


def test_a_model_with_a_cache_has_it_off_while_it_trains():
    model, seen = tiny("qwen2"), []
    model.register_forward_pre_hook(lambda m, _: seen.append(m.config.use_cache) or None)
    for cached in (True, False):
        model.config.use_cache = cached
        select(model, batches(), terms=["value"])
        assert model.config.use_cache is cached and not any(seen)
