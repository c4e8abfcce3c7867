"""The gains of a model's terms, against gradients taken one example at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers as hf
from conftest import batch, tiny

from beft_ext import measure_gains, prepare, select
from beft_ext.gains import GainError, Gram, Regression, gain, together
from beft_ext.models import find_biases
from beft_ext.selection import SelectionError, read_selection
from beft_ext.selection.equations import Equations
from beft_ext.selection.evidence import LEAST_COLUMNS, bands, fitting
from beft_ext.tasks import Batches
from beft_ext.tasks.batches import Encoded, padded
from beft_ext.training.observed import Observed, model_observe


def state_of(model):
    return (
        {n: t.clone() for n, t in model.state_dict().items()},
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [m.training for m in model.modules()],
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )


def batches(count=4, **kind):
    return [batch(seed=seed, **kind) for seed in range(count)]


def literal(model, loader, term):
    """K, t and Z of a term by autograd, one example and one bias at a time."""
    rows, targets, prior = [], [], []
    biases = [b for b in find_biases(model) if b.term == term]
    parameters = [model.get_parameter(b.parameter) for b in biases]
    model.eval()
    for given in loader:
        for i in range(len(given["labels"])):
            own = {k: v[i : i + 1] for k, v in given.items()}
            logits = model(**own).logits[0].double()
            p = logits.softmax(-1)
            right = int(own["labels"])
            grads = torch.autograd.grad(-p[right].log(), parameters)
            pairs = zip(biases, grads, strict=True)
            row = torch.cat([b.view(g).flatten().double() for b, g in pairs])
            weight = (p[right] / (1 - p[right])).sqrt().detach()
            rows.append(row * weight)
            targets.append(1 / weight)
            hot = torch.eye(len(p), dtype=torch.float64)[right]
            prior.append(((p.detach() - hot) * weight)[1:])
    g = torch.stack(rows)
    return g @ g.T, torch.stack(targets), torch.stack(prior)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gains_are_those_of_literal_gradients(name):
    model, loader = tiny(name), batches()
    found = measure_gains(model, loader, terms=["value", "mlp_up"])
    assert found.examples == sum(len(b["labels"]) for b in loader)
    for term in ("value", "mlp_up"):
        matrix, targets, prior = literal(model, loader, term)
        # Sums of fp32 products: rounding grows with the root of their number.
        scale = float(matrix.diagonal().max())
        torch.testing.assert_close(found.evidence.of_term(term), matrix, rtol=0, atol=1e-5 * scale)
        told = gain(Gram.of(matrix), Regression(targets, prior, torch.arange(len(targets))))
        assert found.values[term] == pytest.approx(told.value, abs=1e-3)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_heads_gain_is_that_of_its_own_gradients(name):
    model, loader = tiny(name), batches()
    found = measure_gains(model, loader, terms="value")
    head = [p for n, p in model.named_parameters() if n.startswith(("classifier", "score"))]
    rows = []
    for given in loader:
        for i in range(len(given["labels"])):
            own = {k: v[i : i + 1] for k, v in given.items()}
            grads = torch.autograd.grad(model(**own).loss, head)
            p = model(**own).logits[0].double().softmax(-1)[int(own["labels"])]
            weight = (p / (1 - p)).sqrt()
            rows.append((torch.cat([g.flatten() for g in grads]).double() * weight).detach())
    g = torch.stack(rows)
    told = gain(Gram.of(g @ g.T), found.evidence.regression)
    assert found.head == pytest.approx(told.value, abs=1e-4)


def test_the_model_comes_back_as_it_was():
    model = tiny("bert").train()
    model.bert.embeddings.requires_grad_(False)
    before, seeded = state_of(model), torch.random.get_rng_state()
    measure_gains(model, batches(2))
    after = state_of(model)
    assert all(torch.equal(before[0][n], t) for n, t in after[0].items())
    assert before[1:] == after[1:]
    assert torch.equal(seeded, torch.random.get_rng_state())


def test_the_same_seed_gives_the_same_gains_to_the_bit():
    model = tiny("bert")
    first, again = (measure_gains(model, batches(2)) for _ in range(2))
    assert first == again


def test_a_bias_free_decoder_has_gains_for_all_that_could_be_added():
    model = tiny("llama")
    names = dict(model.named_parameters()).keys()
    found = measure_gains(model, batches())
    assert set(found.ranking) >= {"query", "value", "mlp_gate", "mlp_up", "mlp_down"}
    assert dict(model.named_parameters()).keys() == names
    prepare(model, found.best)


def test_dead_terms_are_named_and_not_ranked():
    found = measure_gains(tiny("bert"), batches(2))
    assert found.dead == ["key"] and "key" not in found.ranking


def test_folded_gradients_give_nearly_the_same_gains():
    model, loader = tiny("bert"), batches(6)
    whole = measure_gains(model, loader, terms="mlp_up")
    rows = whole.examples * 2 * (LEAST_COLUMNS / 2 + 4.0)  # two layers
    folded = measure_gains(model, loader, terms="mlp_up", memory=rows)
    if whole.elements["mlp_up"] > 2 * LEAST_COLUMNS:
        assert folded.folded and not whole.folded
    assert folded.values["mlp_up"] == pytest.approx(whole.values["mlp_up"], abs=0.3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_rows_of_16_bits_move_no_gain_by_more_than_a_hundredth(name):
    model, loader = tiny(name), batches(16)
    whole = measure_gains(model, loader)
    size = 4.0 * whole.examples * sum(whole.elements.values())
    narrow = measure_gains(model, loader, memory=0.6 * size)
    assert not narrow.folded
    for term, value in whole.values.items():
        assert narrow.values[term] == pytest.approx(value, abs=0.01)
    for first, second in pairwise(whole.ranking):
        if whole.values[first] - whole.values[second] > 0.02:
            assert narrow.values[first] > narrow.values[second]


def test_what_does_not_fit_even_folded_is_refused_with_the_bytes():
    biases = list(find_biases(tiny("bert")))
    width = sum(b.width for b in biases)
    assert fitting(biases, 100, 400 * width) == (None, None)
    assert fitting(biases, 100, 400 * width - 1) == (16, None)
    sixteen, eight, four = (100 * (k * width / 8 + 4 * len(biases)) for k in (16, 8, 4))
    assert fitting(biases, 100, sixteen) == (16, None)
    assert fitting(biases, 100, sixteen - 1) == (8, None)
    assert fitting(biases, 100, eight - 1) == (4, None)
    assert fitting(biases, 100, four) == (4, None)
    with pytest.raises(GainError, match="even when folded"):  # none is wider than 64
        fitting(biases, 100, four - 1)
    with pytest.raises(GainError, match="need 1 MiB even when folded"):
        fitting(biases, 100, 1000)


def test_bands_share_the_layers_evenly():
    assert bands(range(6)) == [(0, 1), (2, 3), (4, 5)]
    assert bands([3]) == [(3, 3)]
    assert bands(range(10, 17)) == [(10, 11), (12, 13), (14, 16)]


def test_layers_and_sets_come_from_the_same_pass():
    found = measure_gains(tiny("bert"), batches(8))
    own = found.bands["value"]
    assert list(own) == [(0, 0), (1, 1)]
    sizes = [n for _, n, _ in found.frontier]
    assert sizes == sorted(sizes)
    assert all(n <= sum(found.elements.values()) for n in sizes)
    times = [found.step_time(f"{term}value") for term in ("", "query@0-0+", "mlp_up@1-1+")]
    assert times == [1, 1, 1]
    assert found.step_time("value@1-1") == found.step_time("query@1-1+value@1-1") == 0.75


def test_entries_with_layers_compete_each():
    found = measure_gains(tiny("bert"), batches(2), terms="value@0+value@1")
    assert sorted(found.ranking) == ["value@0", "value@1"]


def test_a_regression_is_explained_by_its_outputs_gradients():
    residuals = torch.tensor([0.5, -1.0, 2.0])
    seen = Observed(residuals**2, torch.ones(3), outputs=residuals + 1, residuals=residuals)
    asked = Equations.of(seen, "abc", 0)
    assert torch.equal(asked.output, seen.outputs) and asked.prior.tolist() == [[1], [1], [1]]
    assert asked.targets.tolist() == [-0.5, 1.0, -2.0]


def test_tokens_are_weighed_by_the_root_of_their_count():
    asked = Equations.of(Observed(torch.tensor([8.0, 3.0]), torch.tensor([4.0, 1])), "ab", 0)
    assert asked.output.tolist() == asked.targets.tolist() == [4.0, 3.0]
    assert asked.prior.shape == (2, 0)


def test_a_group_that_the_batches_name_is_left_out_as_a_whole():
    """As a regression with these groups says it, whatever the values are; the model and the run
    are not given them."""
    model, loader = tiny("bert"), batches(6)
    users = [["ann", "bob", "ann", None], ["eve", "eve", "dan", "bob"], *[list("wxyz")] * 4]
    named = [b | {"user": own} for b, own in zip(loader, users, strict=True)]
    found = measure_gains(model, named, terms="value+mlp_up", groups="user")
    plain = measure_gains(model, loader, terms="value+mlp_up")
    groups = together(range(24), [name for own in users for name in own])
    assert len(groups.unique()) == 9
    assert torch.equal(found.evidence.regression.groups, groups)
    for term, value in found.values.items():
        own = plain.evidence.regression
        told = gain(
            Gram.of(plain.evidence.of_term(term)), Regression(own.targets, own.prior, groups)
        )
        assert value == pytest.approx(told.value) and value != plain.values[term]
    selection = select(model, named, terms="value+mlp_up", groups="user", steps=2)
    assert selection.gains == found and selection.losses
    numbered = [b | {"user": torch.arange(4)} for b in loader]
    again = measure_gains(model, numbered, terms="value", groups="user")
    assert len(again.evidence.regression.blocks) == 4
    with pytest.raises(GainError, match="the batches have no 'user'"):
        measure_gains(model, loader, groups="user")
    with pytest.raises(GainError, match="'user' has 3 values for 4 examples"):
        measure_gains(model, [b | {"user": [1, 2, 3]} for b in loader], groups="user")


def test_a_pass_needs_no_more_than_is_asked_for():
    assert measure_gains(tiny("bert"), batches(8), examples=8).examples == 8


def test_a_batch_is_cut_where_enough_is_read():
    model = tiny("bert")
    found = measure_gains(model, batches(3), examples=6, terms="value")
    cut = [batch(seed=0), {k: v[:2] for k, v in batch(seed=1).items()}]
    assert found.examples == 6
    assert found.values == measure_gains(model, cut, terms="value").values


def test_a_first_batch_that_is_small_does_not_end_the_reading():
    small = {k: v[:1] for k, v in batch(seed=9).items()}
    assert measure_gains(tiny("bert"), [small, *batches(2)], terms="value").examples == 9


def test_a_loss_of_examples_is_observed_by_itself():
    model, loader = tiny("bert"), batches(3)

    def losses(model, given):
        logits = model(**{k: v for k, v in given.items() if k != "labels"}).logits
        return torch.nn.functional.cross_entropy(logits, given["labels"], reduction="none")

    assert select(model, loader, loss=losses, steps=0).ranking["gain"]
    with pytest.raises(GainError, match="observe="):
        select(model, loader, loss=lambda m, b: losses(m, b).mean(), steps=0)


def test_a_notebook_sees_two_lines_of_the_gains():
    found = measure_gains(tiny("bert"), batches())
    first, *others = found.ranking
    shown = f"<Gains: {first} {found.values[first]:.3f}±{found.errors[first]:.3f} > {others[0]} "
    assert repr(found).startswith(shown) and len(repr(found).splitlines()) == 2
    assert repr(found).endswith(f"\n dead: key; not sure, {found.examples} examples>")
    empty = replace(found, ranking=[], dead=["cross_attention_output@0"])
    assert "no term is ranked" in repr(empty) and "output@0 " in str(empty)


def test_a_selection_keeps_the_gains_in_its_files(tmp_path):
    found = select(tiny("bert"), batches(3))
    assert found.best == found.gains.best and found.losses
    found.save(tmp_path)
    assert read_selection(tmp_path).gains == found.gains
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "gains.safetensors")
    total = sum(t for n, t in tensors.items() if n.startswith(f"gram/{found.best}/"))
    regression = Regression(tensors["targets"], tensors["prior"], tensors["groups"])
    told = gain(Gram.of(total), regression)
    assert told.value == pytest.approx(found.gains.values[found.best], abs=1e-4)
    with open(tmp_path / "gains.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"x")
    with pytest.raises(SelectionError, match="damaged"):
        read_selection(tmp_path)


def test_a_loader_that_can_be_read_once_serves_the_gains_alone():
    model = tiny("bert")
    assert select(model, iter(batches(3)), steps=0).gains.examples
    with pytest.raises(SelectionError, match="read once"):
        select(model, iter(batches(3)), steps=2)


def alike(given):
    return given | {"labels": torch.zeros_like(given["labels"])}


def poisoned(model, given):
    seen = model_observe(model, given)
    factor = torch.ones_like(seen.losses)
    factor[1] = float("nan")
    return Observed(seen.losses * factor, seen.counts)


@pytest.mark.parametrize(
    ("loader", "options", "kind", "message"),
    [
        ([], {}, SelectionError, "empty"),
        (batches(1), {"terms": "mlp_gate"}, SelectionError, "no term 'mlp_gate'"),
        ([{k: v[:1] for k, v in batch().items()}], {}, GainError, "at least 3"),
        ([batch(seed=0)] * 3, {"observe": poisoned}, GainError, "example 1 is not finite"),
        ([alike(batch(seed=s)) for s in range(2)], {}, GainError, "every example has the label 0"),
        (batches(1), {"memory": 10}, GainError, "even when folded"),
    ],
)
def test_what_tells_nothing_is_said_in_a_sentence(loader, options, kind, message):
    model = tiny("bert")
    before = state_of(model)
    with pytest.raises(kind, match=message):
        measure_gains(model, loader, **options)
    assert before[1:] == state_of(model)[1:]


def test_a_language_models_examples_are_told_apart_when_packed():
    """Four texts in one row have the gains of the four, one a row."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, attention_bias=True, attn_implementation="sdpa",
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    texts = [torch.randint(3, 64, (n,)) for n in (5, 7, 6, 8, 5, 9)]
    alone = [
        {"input_ids": t[None], "labels": t[None], "attention_mask": torch.ones(1, len(t)).long()}
        for t in texts
    ]
    packed = {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(len(t)) for t in texts])[None],
        "labels": torch.cat([t.index_fill(0, torch.tensor(0), -100) for t in texts])[None],
    }
    one, all_at_once = (
        measure_gains(model, loader, terms="value+mlp_down", examples=6)
        for loader in (alone, [packed])
    )
    assert one.examples == all_at_once.examples == 6
    for term in ("value", "mlp_down"):
        first, second = (g.evidence.of_term(term) for g in (one, all_at_once))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4 * float(first.max()))


def test_gains_of_batches_by_length_are_those_of_any_batches():
    """Where all examples are read, how they were put together changes padding alone."""
    lengths = torch.randint(2, 20, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    generator = torch.Generator().manual_seed(1)
    rows = [
        Encoded(torch.randint(3, 64, (n,), generator=generator).tolist(), i % 2, n)
        for i, n in enumerate(lengths)
    ]

    def collate(some):
        return {
            "input_ids": padded([r.fields for r in some], 0),
            "attention_mask": padded([[1] * r.length for r in some], 0),
            "labels": torch.tensor([int(r.label) for r in some]),
        }

    model = tiny("bert")
    by_length, random = (
        measure_gains(model, Batches(rows, collate, 4, 0, way), terms=["value", "mlp_up", "query"])
        for way in (True, False)
    )
    assert by_length.ranking == random.ranking and by_length.examples == 24
    for term, value in random.values.items():
        assert by_length.values[term] == pytest.approx(value, abs=1e-4)
