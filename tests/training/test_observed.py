"""What is observed of examples: one at a time, and together the loss that is trained."""

import pytest
import torch
import transformers as hf
from conftest import SIZES, T5, tiny
from test_loss import MIXED, SEVERAL, bert, classes, numbers, opt, several, tokens

from beft_ext.training.loss import LossError
from beft_ext.training.observed import model_observe

EPS = torch.finfo(torch.float32).eps


def t5():
    torch.manual_seed(0)
    config = hf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0)
    return hf.T5ForConditionalGeneration(config)


def regression():
    return bert("BertForSequenceClassification", num_labels=1, problem_type="regression")


NUMBERS = {"input_ids": numbers(64, 4, 7), "labels": torch.tensor([0.5, -2.0, 1.0, 3.0])}
VECTORS = {"input_ids": numbers(64, 4, 7), "labels": torch.randn(4, 3)}
CHOICES = {"input_ids": numbers(64, 2, 3, 7), "labels": torch.tensor([2, 0])}
KINDS = {
    "classes": (lambda: tiny("bert"), MIXED, 1),
    "a class left out": (lambda: tiny("bert"), classes(0, 1, -100, 0), None),
    "choices": (lambda: bert("BertForMultipleChoice"), CHOICES, 1),
    "numbers": (regression, NUMBERS, 1),
    "vectors": (
        lambda: bert("BertForSequenceClassification", num_labels=3, problem_type="regression"),
        VECTORS,
        3,
    ),
    "several targets": (several, SEVERAL, 3),
    "causal": (opt, tokens(64), None),
    "causal, number given": (opt, tokens(64) | {"num_items_in_batch": 50}, None),
    "masked": (lambda: bert("BertForMaskedLM"), tokens(64), None),
    "seq2seq": (t5, tokens(64), None),
    "token classes": (lambda: bert("BertForTokenClassification", num_labels=3), tokens(3), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_those_of_one_at_a_time_and_add_up_to_the_loss(kind):
    make, batch, count = KINDS[kind]
    model = make().eval()
    seen = model_observe(model, batch)
    divisor = batch.get("num_items_in_batch", seen.counts.sum())
    # fp32 sums of at most 28 losses below 10.
    torch.testing.assert_close(seen.losses.sum() / divisor, model(**batch).loss,
                               rtol=1e-5, atol=0)  # fmt: skip
    assert count is None or seen.counts.tolist() == [count] * len(batch["labels"])
    for i in range(len(batch["labels"])):
        one = {k: v[i : i + 1] for k, v in batch.items() if isinstance(v, torch.Tensor)}
        if bool(one["labels"].eq(-100).all()):
            assert seen.losses[i] == seen.counts[i] == seen.means[i] == 0
            continue
        torch.testing.assert_close(seen.means[i], model(**one).loss, rtol=1e-5, atol=1e-6)


def test_an_answer_has_two_labels_and_none_where_it_is_outside_of_the_text():
    """Oracle: the model's own loss, of each example and of all; half of one example is refused,
    for the model takes the mean of the beginnings and that of the ends apart."""
    model = bert("BertForQuestionAnswering").eval()
    places = {"start_positions": [1, 0, 9, 6], "end_positions": [3, 0, 7, 6]}
    batch = {"input_ids": numbers(64, 4, 7)} | {k: torch.tensor(v) for k, v in places.items()}
    seen = model_observe(model, batch)
    assert seen.counts.tolist() == [2, 2, 0, 2] and seen.losses[2] == 0
    torch.testing.assert_close(
        seen.losses.sum() / seen.counts.sum(), model(**batch).loss, rtol=1e-5, atol=0
    )
    for i in (0, 1, 3):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        torch.testing.assert_close(seen.means[i], model(**one).loss, rtol=1e-5, atol=1e-6)
    batch["end_positions"][2] = 5
    with pytest.raises(LossError, match="losses of single examples"):
        model_observe(model, batch)


def test_classes_have_probabilities_and_numbers_have_residuals():
    model = tiny("bert")
    seen = model_observe(model, MIXED)
    assert torch.equal(seen.right, MIXED["labels"]) and seen.outputs is None
    torch.testing.assert_close(seen.probabilities, model(**MIXED).logits.softmax(-1))
    model = regression().eval()
    seen = model_observe(model, NUMBERS)
    torch.testing.assert_close(seen.outputs, model(**NUMBERS).logits.flatten())
    assert torch.equal(seen.residuals, seen.outputs - NUMBERS["labels"])
    assert seen.probabilities is None
    gradient = torch.autograd.grad(seen.losses[0], model.classifier.bias)
    torch.testing.assert_close(gradient[0], 2 * seen.residuals[:1].detach())


def test_packed_texts_are_examples_each():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, intermediate_size=48)).eval()
    model.config.use_cache = False
    texts = [numbers(64, 1, n, seed=n) for n in (5, 9, 4)]
    packed = {
        "input_ids": torch.cat(texts, 1),
        "labels": torch.cat(texts, 1),
        "position_ids": torch.cat([torch.arange(t.shape[1]) for t in texts])[None],
    }
    packed["labels"][0, [0, 5, 14]] = -100
    seen = model_observe(model, packed)
    assert seen.counts.tolist() == [4, 8, 3]
    for mean, text in zip(seen.means, texts, strict=True):
        torch.testing.assert_close(mean, model(input_ids=text, labels=text).loss)


@pytest.mark.parametrize("make", [t5, opt, lambda: tiny("bert")])
def test_a_model_in_half_precision_is_observed_too(make):
    batch = MIXED if isinstance(make(), hf.BertForSequenceClassification) else tokens(64)
    assert model_observe(make().bfloat16().eval(), batch).losses.dtype == torch.float32


def test_a_loss_that_is_not_finite_is_given_as_it_is():
    model = tiny("bert")
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    assert model_observe(model, MIXED).losses.isnan().all()


class Weighted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tiny("bert")

    def forward(self, **batch):
        output = self.inner(**batch)
        output.loss = 1.1 * output.loss
        return output


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Weighted(), MIXED, r"let the loss return the losses of the examples \(B,\)"),
        (tiny("bert"), {"input_ids": MIXED["input_ids"]}, "the batches need 'labels'"),
    ],
)
def test_a_loss_of_another_kind_is_refused(model, batch, message):
    with pytest.raises(LossError, match=message):
        model_observe(model, batch)
