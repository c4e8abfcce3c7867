"""Per-example statistics under every kind of loss: against one example at a time, in float64."""

import pytest
import torch
import transformers as hf
from conftest import SIZES, T5, tiny
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from beft_ext import SelectionError, select
from beft_ext.training.loss import Divisor, LossError, examples_of, offsets_of, rows_of, scalar

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
WEIGHTS = torch.tensor([1.0, 3.0])


def random(config, kind):
    torch.manual_seed(0)
    model = getattr(hf, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def bert(kind, **own):
    return random(hf.BertConfig(**SIZES, **NO_DROPOUT, intermediate_size=48, **own), kind)


def opt():
    return random(hf.OPTConfig(**SIZES, **OPT), "OPTForCausalLM")


def numbers(high, *shape, seed=1):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def tokens(high, full=False):
    labels = numbers(high, 4, 7, seed=2)
    if not full:
        labels[numbers(2, 4, 7, seed=3).bool()] = -100
        labels[:, 3] = 1
    return {"input_ids": numbers(64, 4, 7), "labels": labels}


def classes(*labels):
    return {"input_ids": numbers(64, len(labels), 7), "labels": torch.tensor(labels)}


def logits(model, batch):
    return model(input_ids=batch["input_ids"]).logits


def own(model, batch):
    return model(**batch).loss


def entropies(model, batch):
    """The loss of each example, by its definition: the sum over the labels that count."""
    return cross_entropy(logits(model, batch).movedim(-1, 1), batch["labels"], reduction="none"
        ).reshape(len(batch["labels"]), -1).sum(1)  # fmt: skip


def next_entropies(model, batch):
    found, labels = logits(model, batch)[:, :-1], batch["labels"][:, 1:]
    return cross_entropy(found.movedim(-1, 1), labels, reduction="none").sum(1)


def binary(model, batch):
    return binary_cross_entropy_with_logits(
        logits(model, batch), batch["labels"], reduction="none"
    ).sum(1)


def weighted(model, batch):
    found = logits(model, batch)
    return cross_entropy(found, batch["labels"], WEIGHTS.to(found.dtype), reduction="none")


def smooth(reduction):
    return lambda model, batch: cross_entropy(
        logits(model, batch), batch["labels"], label_smoothing=0.1, reduction=reduction
    )


def unshifted(model, batch):
    return cross_entropy(logits(model, batch).movedim(-1, 1), batch["labels"])


def head():
    return bert("BertForSequenceClassification")


def several():
    return bert(
        "BertForSequenceClassification",
        num_labels=3,
        problem_type="multi_label_classification",
    )


SEVERAL = {"input_ids": numbers(64, 4, 7), "labels": numbers(2, 4, 3).float()}
MIXED = classes(0, 1, 1, 0)
# The model, its batch, the loss that select is given, and the losses of examples by definition.
KINDS = {
    "causal": (opt, tokens(64), own, next_entropies),
    "causal, every label": (opt, tokens(64, full=True), own, next_entropies),
    "number given": (opt, tokens(64) | {"num_items_in_batch": 50}, own, next_entropies),
    "causal, not shifted": (opt, tokens(64, full=True), unshifted, entropies),
    "masked": (lambda: bert("BertForMaskedLM"), tokens(64), own, entropies),
    "tokens": (lambda: bert("BertForTokenClassification", num_labels=3), tokens(3), own, entropies),
    "classes": (head, MIXED, own, entropies),
    "a class left out": (head, classes(0, 1, -100, 0), own, entropies),
    "several targets": (several, SEVERAL, own, binary),
    "losses of examples": (head, MIXED, entropies, entropies),
    "sum": (head, MIXED, lambda m, b: entropies(m, b).sum(), entropies),
    "sum over tokens": (opt, tokens(64), lambda m, b: next_entropies(m, b).sum(), next_entropies),
    "smoothed": (head, MIXED, smooth("mean"), smooth("none")),
    "weighted, with its divisor": (
        head,
        MIXED,
        lambda m, b: (weighted(m, b).sum() / 8, torch.tensor(8.0)),
        weighted,
    ),
}


def squares(model, batch, losses):
    """The mean over examples and elements of the squared gradient of each value bias."""
    model, total = model.double().eval(), 0
    biases = [p for n, p in model.named_parameters() if n.endswith(("value.bias", "v_proj.bias"))]
    for i in range(4):
        one = {k: v[i : i + 1] for k, v in batch.items() if isinstance(v, torch.Tensor)}
        one = {k: v.double() if v.is_floating_point() else v for k, v in one.items()}
        biases = [
            p for n, p in model.named_parameters() if n.endswith(("value.bias", "v_proj.bias"))
        ]
        grads = torch.autograd.grad(losses(model, one).sum(), biases)
        total = total + torch.stack([g.square().mean() for g in grads]) / 4
    return total.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_that_of_one_example_at_a_time(kind):
    make, batch, loss, losses = KINDS[kind]
    found = select(
        make(), [batch], "example_fisher", loss=loss, steps=1, lr=1e-9, max_grad_norm=0.0
    )
    # Sums of some hundred single-precision products, squared.
    assert found.per_layer["example_fisher"]["value"] == pytest.approx(
        squares(make(), batch, losses), rel=1e-4
    )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda m, b: cross_entropy(logits(m, b), b["labels"], WEIGHTS),
            "a mean of cannot be told",
        ),
        (lambda m, b: entropies(m, b).mean().square(), "cannot be told"),
        (lambda m, b: logits(m, b), r"shape \(4, 2\), but the batch has 4 examples"),
    ],
)
def test_a_loss_whose_examples_cannot_be_told_is_refused(loss, message):
    with pytest.raises(SelectionError, match=message):
        select(head(), [MIXED], "example_fisher", loss=loss)


def test_four_packed_texts_are_four_examples():
    lengths, model = (
        (5, 9, 4, 7),
        random(
            hf.LlamaConfig(**SIZES, intermediate_size=48, attention_bias=True), "LlamaForCausalLM"
        ),
    )
    texts = [numbers(64, 1, n, seed=n) for n in lengths]
    labels = torch.cat(texts, 1)
    offsets = torch.tensor([0, 5, 14, 18, 25])
    labels[0, offsets[:-1]] = -100
    packed = {
        "input_ids": torch.cat(texts, 1),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    assert torch.equal(offsets_of(packed), offsets) and examples_of(packed, offsets) == 4
    found = select(model, [packed], steps=1, lr=1e-9, max_grad_norm=0.0)
    exact, want = model.double().eval(), 0
    biases = [p for n, p in exact.named_parameters() if n.endswith("v_proj.bias")]
    for text in texts:
        losses = next_entropies(exact, {"input_ids": text, "labels": text})
        grads = torch.autograd.grad(losses.sum(), biases)
        want = want + torch.stack([g.square().mean() for g in grads]) / 4
    got = found.per_layer["example_fisher"]["value"]
    assert got == pytest.approx(want.tolist(), rel=1e-4)
    assert model.config.use_cache


def test_rows_are_packed_only_where_positions_start_anew():
    rows = {"input_ids": numbers(64, 2, 4), "labels": numbers(64, 2, 4)}
    assert offsets_of(rows) is None
    assert offsets_of(rows | {"position_ids": torch.arange(4).expand(2, 4)}) is None
    assert offsets_of({"labels": torch.tensor([0, 1]), "position_ids": torch.zeros(2, 4)}) is None
    assert offsets_of({"cu_seq_lens_q": torch.tensor([0, 3, 8])}).tolist() == [0, 3, 8]
    two = rows | {"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])}
    assert offsets_of(two).tolist() == [0, 2, 4, 8]
    padded = two | {"labels": torch.tensor([[-100, 5, -100, -100], [-100, 7, 8, 9]])}
    assert examples_of(padded, offsets_of(padded)) == 2


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_models_of_both_ways_and_of_other_names_are_measured(name):
    config = {
        "t5": hf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0),
        "gpt2": hf.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=64,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        ),
    }[name]  # fmt: skip
    model = random(config, {"t5": "T5ForConditionalGeneration", "gpt2": "GPT2LMHeadModel"}[name])
    batch = tokens(64)

    def examples(model, batch):
        found, labels = model(**batch).logits, batch["labels"]
        if name == "gpt2":
            found, labels = found[:, :-1], labels[:, 1:]
        return cross_entropy(found.movedim(-1, 1), labels, reduction="none").sum(1)

    scalars, each = (
        select(model, [batch], "example_fisher", loss=loss, steps=1, lr=1e-9, max_grad_norm=0.0)
        for loss in (own, examples)
    )
    for term, layers in each.per_layer["example_fisher"].items():
        assert scalars.per_layer["example_fisher"][term] == pytest.approx(layers, rel=1e-3)


def test_a_model_in_half_precision_is_measured_too():
    found = select(tiny("bert").bfloat16(), [MIXED], steps=1, lr=1e-9)
    assert found.ranking["example_fisher"]


def masked(seed, *shape):
    """Random labels of three classes, some left out; at least one counts behind the first."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, shape, generator=generator)
    share = torch.rand((), generator=generator)
    labels[torch.rand(shape, generator=generator) < share] = -100
    labels[seed % len(labels), -1] = 2
    return {"x": torch.randn(*shape, 3, generator=generator).double(), "labels": labels}


def shifted(batch):
    return batch["labels"][:, 1:]


# What the sum over the labels is divided by, as users' losses do it.
DIVIDED = {
    "labels": lambda batch: batch["labels"].ne(-100).sum(),
    "labels but the first": lambda batch: shifted(batch).ne(-100).sum(),
    "number given": lambda batch: batch["num_items_in_batch"],
    "rows": lambda batch: len(batch["labels"]),
    "nothing": lambda batch: 1,
}


def measured(by, *batches, causal=False):
    """The divisor of the last batch, after those before."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()

    def loss(model, batch):
        found, labels = model(batch["x"]), batch["labels"]
        if causal:
            found, labels = found[:, :-1], shifted(batch)
        return cross_entropy(found.movedim(-1, 1), labels, reduction="sum") / by(batch)

    divisor = Divisor(loss, list(model.parameters()))
    return [divisor.measured(model, batch) for batch in batches][-1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by", DIVIDED)
def test_what_a_sum_over_labels_was_divided_by_is_measured(by, causal):
    for seed in range(25):
        batch = masked(seed, 2 + seed % 3, 3 + seed % 4)
        if by == "number given":
            batch["num_items_in_batch"] = torch.tensor(17)
        if causal != (by == "labels but the first") and by.startswith("labels"):
            continue  # another sum than the one divided by
        assert measured(DIVIDED[by], batch, causal=causal) == float(DIVIDED[by](batch)), batch


@pytest.mark.parametrize("places", [[0], [1], [3], [0, 3], [1, 2]], ids=str)
@pytest.mark.parametrize("by", ["labels", "labels but the first", "rows", "nothing"])
def test_a_batch_of_few_labels_tells_as_much_as_any(by, places):
    few = masked(0, 3, 4)
    few["labels"] = torch.full((3, 4), -100)
    for column in places:
        few["labels"][:, column] = torch.arange(3)
    other = masked(1, 4, 6)
    causal = by == "labels but the first"
    assert measured(DIVIDED[by], few, other, causal=causal) == float(DIVIDED[by](other))


def test_a_number_that_is_given_and_not_used_is_not_taken():
    for number in (1, 2, 50):
        batch = masked(0, 3, 4) | {"num_items_in_batch": number}
        assert measured(DIVIDED["labels"], batch) == float(DIVIDED["labels"](batch))


def test_a_batch_without_any_label_has_the_divisor_zero():
    empty = masked(0, 3, 4)
    empty["labels"] = torch.full((3, 4), -100)
    assert measured(DIVIDED["labels"], masked(0, 3, 4), empty) == 0


@pytest.mark.parametrize("by", ["labels", "nothing"])
@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=str)
def test_a_label_a_row_is_measured_in_any_shape(shape, by):
    for labels in ([0, 1, 2, 0], [1, 1, 1, 1], [0, -100, 1, 0], [0, -100, -100, 0]):
        batch = {"x": torch.randn(*shape, 3).double(), "labels": torch.tensor(labels).view(shape)}
        assert measured(DIVIDED[by], batch) == float(DIVIDED[by](batch))


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [1, 1, 1, 1], [0, -100, -100, 0]], ids=str)
def test_a_batch_of_one_class_does_not_hide_that_classes_are_weighted(labels):
    model, weights = nn.Linear(3, 2), torch.tensor([1.0, 3.0])
    batch = {"x": torch.randn(4, 3), "labels": torch.tensor(labels)}
    divisor = Divisor(
        lambda m, b: cross_entropy(m(b["x"]), b["labels"], weights), list(model.parameters())
    )
    with pytest.raises(LossError, match="cannot be told"):
        divisor.measured(model, batch)


@pytest.mark.parametrize("shape", [(4,), (4, 3)], ids=str)
def test_labels_that_are_floats_stay_those_of_the_batch(shape):
    """A loss may be defined for them alone, as a logarithm of what is positive is."""
    seen, model = [], nn.Linear(3, 1)
    batch = {"x": torch.rand(*shape, 3), "labels": torch.full(shape, 0.5)}

    def loss(model, batch):
        seen.append(batch["labels"])
        return (model(batch["x"])[..., 0] - batch["labels"].log()).square().mean()

    assert Divisor(loss, list(model.parameters())).measured(model, batch) == batch["labels"].numel()
    assert all(labels.eq(0.5).all() for labels in seen)


def test_a_batch_without_labels_is_measured_by_its_rows():
    model, batch = nn.Linear(3, 1), {"x": torch.rand(4, 3), "name": "text"}
    for value, want in ((torch.mean, 4.0), (torch.sum, 1.0)):
        divisor = Divisor(lambda m, b, f=value: f(m(b["x"])), list(model.parameters()))
        assert divisor.measured(model, batch) == want
    with pytest.raises(LossError, match="first axis"):
        rows_of({"name": "text", "scale": torch.tensor(1.0)})


def test_measuring_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    model[0].bias.requires_grad_(False)
    batch = {"x": torch.rand(4, 3), "labels": torch.tensor([0, 1, 2, 0])}
    parameters, calls = list(model.parameters()), []

    def loss(model, batch):
        calls.append(model.training)
        assert all(p.requires_grad for p in parameters)
        return cross_entropy(model(batch["x"]), batch["labels"])

    torch.manual_seed(3)
    divisor = Divisor(loss, parameters)
    assert divisor.measured(model, batch) == 4 and not any(calls)
    assert divisor.measured(model, {k: v[:3] for k, v in batch.items()}) == 3
    assert len(calls) == 4 and model.training and model[1].training
    assert [p.requires_grad for p in parameters] == [True, False]
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn) and all(p.grad is None for p in parameters)


def test_a_loss_that_tells_is_believed():
    divisor = Divisor(lambda m, b: (m(b["x"]).sum(), 7), [])
    assert divisor.of((torch.tensor(2.0), torch.tensor(7)), {}, 4) == 7.0
    assert divisor.of(torch.ones(4), {}, 4) == 4.0
    model = nn.Linear(3, 1)
    divisor.parameters = list(model.parameters())
    assert divisor.measured(model, {"x": torch.rand(4, 3)}) is None
    assert scalar((torch.tensor(2.0), 7)) == 2 and scalar(torch.tensor([1.0, 3.0])) == 2


def test_packed_texts_by_their_lengths_or_positions():
    lengths = torch.tensor([[0, 3, 8]], dtype=torch.int32)
    for name in ("cu_seq_lens_q", "cu_seq_lens"):
        found = offsets_of({name: lengths, "labels": torch.zeros(1, 8)})
        assert found.dtype == torch.int64 and found.tolist() == [0, 3, 8]
    places = torch.tensor([[5, 6, 0, 1]])  # the second text starts anew
    assert offsets_of({"position_ids": places}).tolist() == [0, 2, 4]
    assert offsets_of({"position_ids": torch.tensor([[0], [0]])}) is None
    assert offsets_of({"position_ids": torch.tensor([[0, 0]])}).tolist() == [0, 1, 2]
    assert offsets_of({"position_ids": torch.tensor([0, 1, 0])}) is None
    assert offsets_of({"position_ids": places, "labels": torch.tensor([1])}).tolist() == [0, 2, 4]
    assert offsets_of({"position_ids": [[0, 0]]}) is None
    offsets = torch.tensor([0, 2, 4, 8])
    assert examples_of({"labels": torch.tensor([1])}, offsets) == 3
    last = torch.tensor([[-100, -100, -100, 5, -100, -100, -100, 6]])
    assert examples_of({"labels": last}, offsets) == 2
    assert examples_of({"labels": torch.tensor([1, 0])}, None) == 2
