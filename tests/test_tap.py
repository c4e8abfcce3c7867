"""The tap: the gradient autograd would give, and the statistics of a batch-of-one loop."""

import copy
import itertools

import pytest
import torch
import transformers as hf
from conftest import batch, tiny
from torch._subclasses import FakeTensorMode
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
    model.get_parameter(find_biases(model)[0].parameter).requires_grad_(False)
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


def stats_of_a_step(model, call, inputs, biases=None, rows=4):
    with Tap(model, biases or find_biases(model)) as tap:
        tap.step(rows, scale=float(rows))
        call(**inputs).loss.backward()
        return tap.statistics()


def one_by_one(model, inputs, rows=4):
    """Squares of the gradients of single examples, by autograd, in float64."""
    biases = find_biases(model)
    ones = [
        autograd(model, biases, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(rows)
    ]
    model.requires_grad_(False)
    return {b: sum(g[b].square() for g in ones) for b in biases}


def assert_squares(found, want):
    for bias, (_, squares) in found.items():
        torch.testing.assert_close(squares, want[bias], rtol=1e-8, atol=1e-14)


def test_gradients_go_on_after_an_optimizer_has_written_the_leaves(family):
    model, inputs = tiny(family).double(), batch()
    biases = find_biases(model)
    with Tap(model, biases) as tap:
        leaves = dict(tap.leaves())
        for _ in range(2):
            for leaf in leaves.values():
                leaf.grad = None
            tap.step(4, scale=4.0)
            model(**inputs).loss.backward()
            with torch.no_grad():
                found = {b: leaf.grad.flatten() for b, leaf in leaves.items()}
                for leaf in leaves.values():
                    leaf.sub_(0.1 * leaf.grad)
        with torch.no_grad():
            for bias, leaf in leaves.items():
                leaf.add_(0.1 * found[bias].view_as(leaf))
    want = autograd(model, biases, inputs)
    for bias in biases:
        torch.testing.assert_close(found[bias], want[bias], rtol=1e-9, atol=1e-12)


LONG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize("tokens", [4, 8])
def test_tokens_first_are_told_from_examples_first(tokens):
    """Longformer's projections give out (T, B, H); as many tokens as examples are the hard case."""
    torch.manual_seed(0)
    config = hf.LongformerConfig(**LONG, intermediate_size=48, attention_window=4, pad_token_id=0)
    model = hf.LongformerForSequenceClassification(config).double().eval()
    inputs = batch(tokens=tokens)
    assert_squares(stats_of_a_step(model, model, inputs), one_by_one(model, inputs))


class Rearranged(torch.nn.Module):
    """A model whose projections see the tokens in an order of their own."""

    def __init__(self, order):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].wq = torch.nn.Linear(8, 8)
        self.embedding, self.order = torch.nn.Embedding(64, 8), order
        self.double()

    def forward(self, input_ids, labels):
        x, rows = self.embedding(input_ids), len(input_ids)
        x = x + x.mean(1, keepdim=True)
        shapes = {
            "flat": lambda y: y.flatten(0, 1),
            "flat, tokens first": lambda y: y.transpose(0, 1).flatten(0, 1),
            "windows": lambda y: y.unflatten(1, (2, -1)).flatten(0, 1),
            "twice": lambda y: y,
            "mixed": lambda y: y + y.mean(0),
        }
        y = shapes[self.order](x)
        for _ in range(2 if self.order == "twice" else 1):
            y = self.layers[0].wq(y.tanh())
        if self.order == "flat, tokens first":
            y = y.unflatten(0, (-1, rows)).transpose(0, 1)
        y = y.reshape(rows, -1, 8)
        losses = (y.square().sum((1, 2)) - labels).square()
        return type("Output", (), {"loss": losses.mean()})


@pytest.mark.parametrize("order", ["flat", "flat, tokens first", "windows", "twice"])
def test_rows_in_any_order_are_found(order):
    model, inputs = Rearranged(order), batch(tokens=8)
    del inputs["attention_mask"]
    biases = find_biases(model, names={"query": "wq"})
    found = stats_of_a_step(model, model, inputs, biases)
    ones = [autograd(model, biases, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(4)]
    assert_squares(found, {b: sum(g[b].square() for g in ones) for b in biases})


class Texts(torch.nn.Module):
    """Texts one after another in one row, each with a loss of its own."""

    def __init__(self, uses):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].wq = torch.nn.Linear(8, 8)
        self.embedding, self.uses = torch.nn.Embedding(64, 8), uses
        self.double()

    def forward(self, input_ids, cu_seq_lens_q):
        y = self.embedding(input_ids)
        for _ in range(self.uses):
            y = self.layers[0].wq(y.tanh())
        texts = y[0].tensor_split(cu_seq_lens_q[1:-1])
        losses = torch.stack([t.square().sum().square() for t in texts])
        return type("Output", (), {"loss": losses.mean()})


@pytest.mark.parametrize("uses", [1, 2])
def test_packed_texts_are_examples(uses):
    model, ids = Texts(uses), batch(rows=1, tokens=12)["input_ids"].clamp(min=1)
    ends = [[0, 3, 8, 12], [0, 5, 6, 12]]
    biases = find_biases(model, names={"query": "wq"})
    with Tap(model, biases) as tap:
        for offsets in map(torch.tensor, ends):
            tap.step(3, scale=3.0, example_offsets=offsets)
            model(ids, offsets).loss.backward()
        found = tap.statistics()[biases[0]]
    ones = [
        autograd(
            model,
            biases,
            {"input_ids": ids[:, a:b], "cu_seq_lens_q": torch.tensor([0, b - a])},
        )[biases[0]]
        for offsets in ends
        for a, b in itertools.pairwise(offsets)
    ]
    torch.testing.assert_close(found[0], sum(ones), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found[1], sum(g.square() for g in ones), rtol=1e-8, atol=1e-14)


def test_packed_texts_that_are_not_all_there_are_refused():
    model, ids = Texts(1), batch(rows=1, tokens=12)["input_ids"].clamp(min=1)
    offsets = torch.tensor([0, 3, 8, 12])
    with Tap(model, find_biases(model, names={"query": "wq"})) as tap:
        tap.step(3, example_offsets=offsets)
        model(ids, offsets).loss.backward()
        tap.step(3, example_offsets=offsets)
        loss = model(ids[:, :11], offsets).loss
        with pytest.raises(TapError, match="gives out 11 rows, but the packed batch has 12 tokens"):
            loss.backward()


def test_examples_that_see_each_other_are_refused():
    model, inputs = Rearranged("mixed"), batch(tokens=8)
    del inputs["attention_mask"]
    with pytest.raises(TapError, match=r"which rows of 'layers\.0\.wq'"):
        stats_of_a_step(model, model, inputs, find_biases(model, names={"query": "wq"}))


def test_a_second_backward_and_a_forward_without_a_step_are_refused():
    model, inputs = tiny("bert"), batch()
    with Tap(model, find_biases(model)) as tap:
        tap.step(4, scale=4.0)
        loss = model(**inputs).loss
        loss.backward(retain_graph=True)
        with pytest.raises(TapError, match="no step announced"):
            loss.backward()
        with pytest.raises(TapError, match="no step announced"):
            model(**inputs).loss.backward()


def test_a_gradient_of_something_else_is_not_counted():
    model, inputs = tiny("bert").double(), batch()
    embedded = model.bert.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"] = embedded.requires_grad_()
    results = []
    for also in (False, True):
        with Tap(model, find_biases(model)) as tap:
            tap.step(4, scale=4.0)
            output = model(**inputs)
            if also:
                torch.autograd.grad(output.logits.sum(), embedded, retain_graph=True)
            output.loss.backward()
            results.append(tap.statistics())
    for bias, (_, squares) in results[0].items():
        assert torch.equal(squares, results[1][bias][1])


def test_a_tapped_model_is_not_copied():
    model = tiny("bert")
    with Tap(model, find_biases(model)), pytest.raises(TapError, match="remove the tap first"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_a_compiled_model_is_the_one_inside_and_its_last_batch_may_be_smaller():
    model = tiny("bert").double()
    compiled = torch.compile(model, backend="aot_eager")
    with Tap(compiled, find_biases(compiled)) as tap:
        for rows in (4, 3):
            inputs = batch(rows=rows)
            tap.step(rows, scale=float(rows))
            compiled(**inputs).loss.backward()
        found = tap.statistics()
    first, last = one_by_one(model, batch()), one_by_one(model, batch(rows=3), rows=3)
    assert_squares(found, {b: first[b] + last[b] for b in first})


def test_copies_of_a_model_are_refused():
    with pytest.raises(TapError, match="DataParallel"):
        Tap(torch.nn.DataParallel(tiny("bert")), [])


def test_a_tied_bias_is_one_with_two_uses():
    model, inputs = tiny("bert").double(), batch()
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.value.bias = first.value.bias
    biases = find_biases(model)
    assert [b.layer for b in biases if b.term == "value"] == [0]
    found = stats_of_a_step(model, model, inputs)
    assert_squares(found, one_by_one(model, inputs))


def test_equal_texts_in_a_batch_are_told_apart():
    model = tiny("bert")
    inputs = batch(2)
    inputs = {k: v[1:].repeat(2, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
    inputs["labels"] = torch.tensor([0, 1])
    with Tap(model, find_biases(model)) as tap:
        tap.step(2, scale=2.0)
        model(**inputs).loss.backward()
        found = {bias: squares for bias, (_, squares) in tap.statistics().items()}
        for bias, squares in found.items():
            assert squares.isfinite().all(), bias.name
    alone = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(2)]
    expected = {bias: torch.zeros(bias.width) for bias in found}
    for one in alone:
        model.zero_grad()
        model(**one).loss.backward()
        for bias in found:
            expected[bias] += bias.read(model.get_parameter(bias.parameter).grad).square()
    for bias, squares in found.items():
        torch.testing.assert_close(squares, expected[bias], rtol=1e-3, atol=1e-9)


def test_gradients_alone_before_any_step_and_at_rest():
    model, inputs = tiny("bert").double(), batch()
    biases = find_biases(model)
    want = autograd(model, biases, inputs)
    with Tap(model, biases) as tap:
        for announced in (False, True):
            if announced:
                tap.step(4)
                tap.rest()
            for _, leaf in tap.leaves():
                leaf.grad = None
            model(**inputs).loss.backward()
            for bias, leaf in tap.leaves():
                torch.testing.assert_close(leaf.grad.flatten(), want[bias], rtol=1e-9, atol=1e-12)
            assert not any(s.any() for both in tap.statistics().values() for s in both)


def test_a_scale_that_the_forward_tells():
    model, inputs = tiny("bert").double(), batch()
    biases = find_biases(model)
    found = []
    for announced, told in ((1.0, 4.0), (4.0, None), (1.0, None)):
        with Tap(model, biases) as tap:
            tap.step(4) if announced == 1 else tap.step(4, announced)
            loss = model(**inputs).loss
            if told is not None:
                tap.divided_by(told)
            loss.backward()
            found.append(tap.statistics())
    for told, scaled, plain in zip(*(f.values() for f in found), strict=True):
        assert torch.equal(told[0], scaled[0]) and torch.equal(told[1], scaled[1])
        torch.testing.assert_close(scaled[0], 4 * plain[0])
        torch.testing.assert_close(scaled[1], 16 * plain[1])


def test_half_precision_has_single_precision_statistics():
    model, inputs = tiny("bert").bfloat16(), batch()
    with Tap(model, find_biases(model)) as tap:
        tap.step(4, scale=4.0)
        model(**inputs).loss.backward()
        for bias, leaf in tap.leaves():
            assert leaf.dtype == leaf.grad.dtype == torch.bfloat16
            total, squares = tap.statistics()[bias]
            assert total.dtype == squares.dtype == torch.float32
            # The gradient is the sum, rounded once.
            torch.testing.assert_close(leaf.grad.flatten().float(), total / 4, rtol=2**-8, atol=0)


def test_statistics_of_shared_layers_add_up_over_steps():
    """The squares of one step are taken before the next one begins."""
    model = tiny("albert").double()
    with Tap(model, find_biases(model)) as tap:
        for seed in (1, 2):
            tap.step(4, scale=4.0)
            model(**batch(seed=seed)).loss.backward()
        found = tap.statistics()
    first, second = (one_by_one(model, batch(seed=seed)) for seed in (1, 2))
    assert_squares(found, {b: first[b] + second[b] for b in first})


def test_where_examples_lie_is_found_once_and_the_model_does_not_notice():
    model, inputs = tiny("bert"), batch()
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with Tap(model, find_biases(model)) as tap:
        torch.manual_seed(5)
        tap.step(4)
        model(**inputs).loss.backward()
        drawn = torch.rand(3)
        located = len(calls)
        assert located > 1 and [m.training for m in model.modules()] == modes
        torch.manual_seed(5)
        tap.step(4)
        model(**inputs).loss.backward()
        assert len(calls) == located + 1 and torch.equal(torch.rand(3), drawn)


def test_where_examples_lie_may_be_found_before_the_step():
    model, inputs = tiny("bert").double(), batch()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with Tap(model, find_biases(model)) as tap:
        tap.locate(lambda given: model(**given), inputs, 4)
        assert not any(s.any() for both in tap.statistics().values() for s in both)
        calls.clear()
        tap.step(4, scale=4.0)
        model(**inputs).loss.backward()
        assert len(calls) == 1
        found = tap.statistics()
    assert_squares(found, one_by_one(model, inputs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda y: y[..., :4], r"'layers\.0\.wq' gives out 4 columns, not 8"),
        (lambda y: (y, None), "a Linear gives out a tuple, not a tensor"),
    ],
    ids=["narrower", "tuple"],
)
def test_an_output_that_is_no_projections_is_refused(changed, message):
    model, inputs = Rearranged("flat"), batch(tokens=8)
    del inputs["attention_mask"]
    model.layers[0].wq.register_forward_hook(lambda module, args, output: changed(output))
    with Tap(model, find_biases(model, names={"query": "wq"})) as tap:
        tap.step(4)
        with pytest.raises(TapError, match=message):
            model.layers[0].wq(torch.ones(4, 8, dtype=torch.double)).sum().backward()


def test_a_single_example_needs_no_search():
    model, inputs = Rearranged("mixed"), batch(rows=1, tokens=8)
    del inputs["attention_mask"]
    biases = find_biases(model, names={"query": "wq"})
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = stats_of_a_step(model, model, inputs, biases, rows=1)
    assert len(calls) == 1
    assert_squares(found, {b: g.square() for b, g in autograd(model, biases, inputs).items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_compiler_is_told_what_the_backward_gives(dtype):
    with FakeTensorMode():
        grad = torch.ops.beft_ext.tap_backward(torch.empty(2, 3, 5, dtype=dtype), 1, 0)
    single = torch.float32 if dtype == torch.bfloat16 else dtype
    assert grad.shape == (5,) and grad.dtype == single


@pytest.mark.parametrize("below", [True, False])
def test_later_outputs_keep_their_own_nodes_and_the_first_has_all_leaves_behind_it(below):
    """A node in autograd's graph costs the host several times what a hook does."""
    model, inputs = tiny("bert").requires_grad_(below), batch()
    taken = []
    with Tap(model, find_biases(model)) as tap:
        tap.step(4, scale=4.0)
        waiting, seen = [model(**inputs).loss.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [n for n, _ in node.next_functions]
            if node.name() == "IdentityBackward":
                taken.append(len(node.next_functions))
        leaves = len(tap.leaves())
    # Where nothing below requires a gradient, layer 0's query, key and value have one each.
    assert sorted(taken) == ([] if below else [2, 2]) + [1 + leaves]


def test_a_forward_that_no_backward_follows_takes_no_gradient_away():
    model, inputs = tiny("bert").double(), batch()
    biases = find_biases(model)
    want = autograd(model, biases, inputs)
    model.requires_grad_(False)
    with Tap(model, biases) as tap:
        for times in (1, 2):
            tap.step(4, scale=4.0)
            model(**inputs)
            model(**inputs).loss.backward()
            for bias, leaf in tap.leaves():
                torch.testing.assert_close(
                    leaf.grad.flatten(), times * want[bias], rtol=1e-9, atol=1e-12
                )


@pytest.mark.parametrize("what", ["in place", "left out", "expanded", "trained below"])
def test_gradients_arrive_whatever_becomes_of_an_output(what):
    """A view that is written to, an output without a gradient, one that is no plain memory."""
    torch.manual_seed(0)
    lower, first, second = (torch.nn.Linear(8, 8).double() for _ in range(3))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    model.layers[0].wq, model.layers[1].wq = first, second
    model.lower = lower.requires_grad_(what == "trained below")

    def losses(x):
        y = second(first(lower(x)).tanh())
        if what == "in place":
            y *= 3
            y[:, 0] = 0
        elif what == "left out":
            y = first(lower(x)) + y.detach()
        elif what == "expanded":
            return y.sum((1, 2))
        return y.square().sum((1, 2))

    x, biases = torch.randn(4, 3, 8).double(), find_biases(model, names={"query": "wq"})
    trained = [first.bias, second.bias]
    every = [torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
             for loss in losses(x)]  # fmt: skip
    model.requires_grad_(False)
    lower.requires_grad_(what == "trained below")
    with Tap(model, biases) as tap:
        tap.step(4)
        tap.locate(lambda given: losses(**given), {"x": x}, 4)
        losses(x).sum().backward()
        for i, (bias, leaf) in enumerate(tap.leaves()):
            grads = torch.stack([torch.zeros(8).double() if g[i] is None else g[i] for g in every])
            found = torch.zeros(8).double() if leaf.grad is None else leaf.grad.flatten()
            torch.testing.assert_close(found, grads.sum(0), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(tap.statistics()[bias][1], grads.square().sum(0))
