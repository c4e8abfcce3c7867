"""select: every score recomputable from its files, the model untouched, bad runs stopped."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from beft_ext.selection.settling import chance
from conftest import CONFIGS, batch, tiny
from safetensors.numpy import load_file

from beft_ext import SelectionError, Tap, TapError, find_biases, prepare, select
from beft_ext.commands import demo
from beft_ext.selection import ProbeError, dead_terms
from beft_ext.tasks import HeadObjective


def loader(n=5):
    return [batch(seed=i) for i in range(n)]


def state(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        sum(len(m._forward_hooks) for m in model.modules()),
    )


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_every_family_selects_and_comes_back_as_it_was(family):
    model = tiny(family)
    before = state(model)
    selection = select(model, loader(), lr=1e-2)
    assert same(before, state(model))
    assert selection.best not in selection.dead
    alive = family in ("gpt-neox", "qwen2", "deberta-v2")  # rotary or relative positions
    assert ("key" in selection.dead) == (not alive)


def test_scores_recompute_from_the_files(tmp_path):
    selection = select(tiny("bert"), loader(), lr=1e-2)
    selection.save(tmp_path)
    record = json.loads((tmp_path / "selection.json").read_text())
    tensors = load_file(tmp_path / "biases.safetensors")
    for term, want in record["scores"]["beft"].items():
        found = []
        for layer in range(2):
            b0 = tensors[f"initial/{layer}.{term}"].astype(float)
            b = tensors[f"current/{layer}.{term}"].astype(float)
            found.append(1 - b0 @ b / max(b0 @ b0, b @ b))
        assert abs(np.mean(found) - want) < 1e-6
    assert (tmp_path / "heatmap.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "biases.safetensors",
        "heatmap.png",
        "selection.json",
    ]


def test_same_seed_same_bits():
    runs = [select(tiny("bert"), loader(), seed=3) for _ in range(2)]
    assert repr(runs[0].scores) == repr(runs[1].scores)  # NaN is not equal to itself
    assert all(torch.equal(runs[0].current[n], runs[1].current[n]) for n in runs[0].current)


def test_zero_bias_is_undefined_and_null(tmp_path):
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.bias.zero_()
    selection = select(model, loader())
    assert "layer 1" in selection.undefined["query"]
    assert "query" not in selection.ranking["beft"] and "query" in selection.ranking["magnitude"]
    selection.save(tmp_path)
    text = (tmp_path / "selection.json").read_text()
    assert json.loads(text)["scores"]["beft"]["query"] is None


class Interrupting:
    def __len__(self):
        return 5

    def __iter__(self):
        yield batch()
        yield batch()
        raise KeyboardInterrupt


def test_interrupt_leaves_the_model_as_it_was():
    model = tiny("bert")
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        select(model, Interrupting(), lr=1e-1)
    assert same(before, state(model))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_nothing():
    model = tiny("bert")
    before = state(model)
    with pytest.raises(SelectionError, match="not finite at step"):
        select(model, loader(), steps=30, lr=1e30, max_grad_norm=1e30)
    assert same(before, state(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "unknown method"),
        ({"terms": ["valu"]}, "unknown term 'valu'"),
        ({"terms": "value@2"}, "the model has 2 layers, 0 to 1"),
        ({"steps": 0}, "nothing to train"),
        ({"settle": 0.5}, "a probability"),
        ({"settle": 0.05, "method": "snr"}, "use beft or magnitude"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(SelectionError, match=message):
        select(tiny("bert"), loader(), **options)


def test_empty_loader():
    with pytest.raises(SelectionError, match="empty"):
        select(tiny("bert"), [], steps=3)


def test_a_model_that_is_tapped_already():
    model = tiny("bert")
    with Tap(model, find_biases(model)), pytest.raises(TapError, match="already"):
        select(model, loader())


def test_dead_terms_stay_out_of_the_run_unless_they_are_named():
    found = select(tiny("bert"), loader(), lr=1e-2)
    assert found.dead == ["key"] and torch.equal(found.initial["0.key"], found.current["0.key"])
    assert found.scores["beft"]["key"] == found.scores["example_fisher"]["key"] == 0
    named = select(tiny("bert"), loader(), lr=1e-2, terms=["key", "value"])
    assert named.dead == ["key"] and named.ranking["beft"] == ["value"]
    assert not torch.equal(named.initial["0.key"], named.current["0.key"])


def test_each_entry_of_a_set_of_terms_is_a_candidate(tmp_path):
    model = tiny("bert")
    found = select(model, loader(), lr=1e-2, terms="value@0+value@1+mlp_up+key@1")
    assert found.dead == ["key@1"]
    assert set(found.ranking["beft"]) == {"value@0", "value@1", "mlp_up"}
    assert set(found.initial) == {"0.value", "1.value", "0.mlp_up", "1.mlp_up", "1.key"}
    rows = {name: len(row) for name, row in found.per_layer["beft"].items()}
    assert rows == {"value@0": 1, "value@1": 1, "mlp_up": 2, "key@1": 1}
    for name, layer in (("value@0", 0), ("value@1", 1)):
        b0, b = (t[f"{layer}.value"].double() for t in (found.initial, found.current))
        want = 1 - float(b0 @ b / max(b0 @ b0, b @ b))
        assert found.scores["beft"][name] == pytest.approx(want, rel=1e-9)
    found.save(tmp_path)
    prepared = prepare(model, found.best)
    assert prepared.terms == (found.best,)


def test_a_settled_run_counts_each_entry():
    """Two entries of one term compete: told as one, they would never settle."""
    given = [batch(seed=i) for i in range(40)]
    found = select(tiny("bert"), given, lr=1e-2, terms="mlp_norm@0+mlp_norm@1", settle=0.49)
    assert found.settled and len(found.ranking["beft"]) == 2


def test_a_bias_is_added_only_where_one_is_named():
    seen = []

    def loss(model, inputs):
        seen.append({n for n, p in model.named_parameters() if n.endswith("bias")})
        return model(**inputs).loss

    select(tiny("llama"), loader(), loss=loss, terms="value@1+mlp_gate@0", lr=1e-2)
    places = {f"model.layers.{p}.bias" for p in ("1.self_attn.v_proj", "0.mlp.gate_proj")}
    assert seen and all(names == places for names in seen)


def test_the_probe_needs_one_attention_at_a_time_and_leaves_no_trace(monkeypatch):
    model, given = tiny("bert"), batch()
    before = state(model)
    copied, deepcopy = [], copy.deepcopy
    monkeypatch.setattr("copy.deepcopy", lambda m, *memo: copied.append(m) or deepcopy(m, *memo))
    assert dead_terms(model, find_biases(model), lambda: model(**given)) == ["key"]
    assert same(before, state(model))
    attentions = [layer.attention.self for layer in model.bert.encoder.layer]
    assert [m for m in copied if m in (model, *model.bert.encoder.layer, *attentions)] == attentions


def test_a_cache_of_keys_is_not_added_to():
    model = transformers.OPTForCausalLM(CONFIGS["opt"]()).eval()
    ids = batch()["input_ids"]
    cache = transformers.DynamicCache(config=model.config)
    dead_terms(model, find_biases(model), lambda: model(input_ids=ids, past_key_values=cache))
    assert cache.get_seq_length() == ids.shape[1]


def test_an_attention_that_cannot_be_probed_is_named(monkeypatch):
    model = tiny("bert")
    attention = model.bert.encoder.layer[0].attention.self

    def single(*args, **kwargs):
        raise RuntimeError("half precision alone")

    monkeypatch.setattr(type(attention), "forward", single)
    with pytest.raises(ProbeError, match=r"layer\.0\.attention\.self.*half precision alone"):
        dead_terms(model, find_biases(model), lambda: attention(torch.ones(1, 3, 32)))


def test_without_any_bias_those_of_the_attention_are_added_for_the_run(bias_free_family):
    model, given = tiny(bias_free_family), loader()
    for each in given:
        each["input_ids"][:, 0] = 1  # T5 asks for the end of the sequence
    before = state(model)
    found = select(model, given, lr=1e-2)
    assert same(before, state(model))
    assert {"query", "key", "value"} <= set(found.scores["magnitude"])
    assert "initial" in found.undefined["value"] and found.ranking["magnitude"]
    only = select(model, given, "magnitude", terms=["attention_output"])
    assert only.best == "attention_output"


def test_a_settled_first_term_ends_the_run(tmp_path):
    model, tokenizer = demo.load()
    rows = demo.examples("train")[:320]
    batches = HeadObjective(demo.TASK, tokenizer).training(rows, 16, seed=0)
    whole = select(model, batches, lr=2e-3, steps=12)
    batches.set_epoch(0)
    short = select(model, batches, lr=2e-3, settle=0.2)
    assert not whole.settled and len(whole.losses) == whole.steps == 12
    assert short.settled and 4 <= len(short.losses) < short.steps == 20
    assert short.best == whole.best == "value"
    assert short.losses == whole.losses[: len(short.losses)]
    short.save(tmp_path)
    record = json.loads((tmp_path / "selection.json").read_text())
    assert record["settled"] and record["steps"] == 20


def test_chance_is_the_noise_of_an_adamw_step():
    """Against a simulation of AdamW on gradients drawn anew for each step."""
    torch.manual_seed(0)
    steps, rows, width, runs, lr = 400, 8, 4, 300, 1e-3
    signal, noise = torch.tensor([0.0, 0.1, 0.5, 3.0]), 1.0
    grads = signal + noise * torch.randn(runs, steps, rows, width, dtype=torch.float64)
    bias = torch.zeros(runs, width, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([bias], lr=lr, weight_decay=0.0)
    for step in range(steps):
        bias.grad = grads[:, step].mean(1)
        optimizer.step()
    flat = grads[0].flatten(0, 1)
    share = chance(flat.sum(0), flat.square().sum(0), steps * rows, steps)
    predicted = (share * steps * lr**2).sqrt()
    found = bias.detach().std(0)
    assert ((found / predicted - 1).abs() < 0.35).all()


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2"])
def test_a_dead_term_that_is_named_runs_alone(name):
    found = select(tiny(name), [batch()] * 2, terms=["key"])
    assert len(found.losses) == 2


def test_a_dead_term_of_a_language_model_runs_alone():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["opt"]())
    ids = batch()["input_ids"]
    found = select(model, [{"input_ids": ids, "labels": ids}] * 2, terms=["key"])
    assert len(found.losses) == 2


def test_a_head_of_zeros_does_not_hide_what_the_loss_is_a_mean_of():
    model = tiny("bert")
    torch.nn.init.zeros_(model.classifier.weight)  # no gradient reaches the body
    assert len(select(model, [batch()] * 2, terms=["value"]).losses) == 2


@pytest.mark.parametrize("tokens", [1, 9])
def test_equal_texts_of_one_repeated_token(tokens):
    data = {k: v[..., :tokens] if v.ndim > 1 else v for k, v in batch().items()}
    data["input_ids"], data["attention_mask"] = (torch.full((4, tokens), n) for n in (7, 1))
    assert len(select(tiny("bert"), [data] * 2).losses) == 2
