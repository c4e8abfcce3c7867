"""The tap: the gradient autograd would give, and the statistics of a batch-of-one loop."""

import pytest
import torch
from conftest import batch, tiny
from torch.utils.checkpoint import checkpoint

from beft_ext import Tap, TapError, find_biases


def autograd(model, biases, inputs):
    names = dict.fromkeys(b.parameter for b in biases)
    parameters = [model.get_parameter(n).requires_grad_() for n in names]
    grads = torch.autograd.grad(model(**inputs).loss, parameters, allow_unused=True)
    by_name = {
        n: torch.zeros_like(p) if g is None else g
        for n, p, g in zip(names, parameters, grads, strict=True)
    }
    return {b: b.read(by_name[b.parameter]) for b in biases}


def test_statistics_equal_a_batch_of_one_loop_in_float64(family):
    model, inputs = tiny(family).double(), batch()
    biases = find_biases(model)
    with Tap(model, biases) as tap:
        tap.step(4, scale=4.0)
        model(**inputs).loss.backward()
        statistics, leaves = tap.statistics(), dict(tap.leaves())
    want = autograd(model, biases, inputs)
    one = [autograd(model, biases, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(4)]
    for bias in biases:
        torch.testing.assert_close(leaves[bias].grad.flatten(), want[bias], rtol=1e-9, atol=1e-12)
        squares = sum(g[bias].square() for g in one)
        torch.testing.assert_close(statistics[bias][1], squares, rtol=1e-8, atol=1e-14)
        total = sum(g[bias] for g in one)
        torch.testing.assert_close(statistics[bias][0], total, rtol=1e-8, atol=1e-12)


def test_forward_is_unchanged_to_the_bit_and_removal_restores(family):
    model, inputs = tiny(family), batch()
    before, keys = model(**inputs).logits, list(model.state_dict())
    required = [p.requires_grad for p in model.parameters()]
    with Tap(model, find_biases(model)):
        assert torch.equal(model(**inputs).logits, before)
        assert list(model.state_dict()) == keys
        with pytest.raises(TapError, match="already"):
            Tap(model, find_biases(model))
    assert [p.requires_grad for p in model.parameters()] == required
    assert not any(m._forward_hooks for m in model.modules())


def test_leaves_share_the_models_memory(family):
    model, inputs = tiny(family), batch()
    biases = find_biases(model)
    before = model(**inputs).logits
    with Tap(model, biases) as tap, torch.no_grad():
        for bias, leaf in tap.leaves():
            if bias.term == "value":
                leaf.add_(1.0)
    assert not torch.allclose(model(**inputs).logits, before)


def test_accumulation_adds_up():
    model = tiny("bert")
    halves = [batch(seed=1), batch(seed=2)]
    with Tap(model, find_biases(model)) as tap:
        for inputs in halves:
            tap.step(4, scale=4.0)
            model(**inputs).loss.backward()
        both = tap.statistics()
    single = []
    for inputs in halves:
        with Tap(model, find_biases(model)) as tap:
            tap.step(4, scale=4.0)
            model(**inputs).loss.backward()
            single.append(tap.statistics())
    for bias, (_, squares) in both.items():
        torch.testing.assert_close(squares, single[0][bias][1] + single[1][bias][1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_counts_once(reentrant):
    model, hidden = tiny("bert"), torch.randn(4, 9, 32, requires_grad=True)
    layer = model.bert.encoder.layer[0]
    biases = [b for b in find_biases(model) if b.layer == 0]
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        with Tap(model, biases) as tap:
            tap.step(4)
            out = call(hidden)
            (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
            results.append(tap.statistics())
    for bias in biases:
        assert torch.equal(results[0][bias][1], results[1][bias][1])


def test_compiled_whole_without_a_graph_break():
    model, inputs = tiny("bert"), batch()
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with Tap(model, find_biases(model)) as tap:
            tap.step(4, scale=4.0)
            call(**inputs).loss.backward()
            results.append((tap.statistics(), [leaf.grad for _, leaf in tap.leaves()]))
    (plain, grads), (compiled, compiled_grads) = results
    for a, b in zip(grads, compiled_grads, strict=True):
        torch.testing.assert_close(a, b)
    for bias in plain:
        torch.testing.assert_close(plain[bias][1], compiled[bias][1])


def test_gradcheck():
    model, inputs = tiny("bert").double(), batch(rows=2, tokens=5)
    biases = [b for b in find_biases(model) if b.layer == 1 and b.term in ("value", "mlp_norm")]
    with Tap(model, biases) as tap:
        # The leaves are the biases' own memory, so gradcheck's perturbation moves the output.
        leaves = [leaf for _, leaf in tap.leaves()]
        assert torch.autograd.gradcheck(lambda *_: model(**inputs).logits, leaves, atol=1e-6)
