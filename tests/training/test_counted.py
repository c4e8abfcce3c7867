"""The positions that count, and no others, go through the output layer: the same loss and the same
gradients as of all of them."""

import copy

import pytest
import torch
import transformers as hf
from conftest import GPT2, GQA, MLP, ROPE, SIZES
from test_loss import NO_DROPOUT, numbers, opt

from beft_ext import Tap, find_biases
from beft_ext.models import output_layer
from beft_ext.training import counted
from beft_ext.training.counted import counted_losses, log_probabilities, logits_at
from beft_ext.training.loss import model_loss
from beft_ext.training.observed import model_observe

GEMMA = SIZES | MLP | GQA | {"head_dim": 8}
CAUSAL = {
    "opt": lambda: hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, **ROPE),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZES, **MLP, **ROPE),
    "gptj (biased head)": lambda: hf.GPTJConfig(**GPT2, rotary_dim=4),
    "llama": lambda: hf.LlamaConfig(**SIZES, **MLP, **GQA),
    "gemma": lambda: hf.GemmaConfig(**GEMMA),
    "gemma2 (capped logits)": lambda: hf.Gemma2Config(**GEMMA, final_logit_softcapping=0.2),
    "cohere (scaled logits)": lambda: hf.CohereConfig(**SIZES, **MLP, **GQA, logit_scale=3.0),
    "granite (scaled logits)": lambda: hf.GraniteConfig(**SIZES, **MLP, **GQA, logits_scaling=0.5),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, **MLP, **GQA, num_local_experts=4),
    "mamba": lambda: hf.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4
    ),
}


def causal(name):
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"} if name == "mixtral" else {}
    return hf.AutoModelForCausalLM.from_config(CAUSAL[name](), **options).double().eval()


def answers(tokens=9):
    """Rows of unlike length, padded on the right; of each the last tokens are labels."""
    ids = numbers(61, 4, tokens) + 3
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row, (length, answer) in enumerate(((9, 1), (6, 2), (4, 1), (7, 3))):
        mask[row, length:] = 0
        labels[row, length - answer : length] = ids[row, length - answer : length]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def widths(model):
    """Positions that reach the output layer, forward by forward."""
    seen = []
    output_layer(model).register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[:-1]))
    return seen


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_and_every_gradient_are_those_of_all_positions(name):
    model, batch = causal(name), answers()
    expected = model(**batch).loss
    grads = gradients(model, expected)
    model_loss(model, batch)  # the first tries whether it may
    seen = widths(model)
    found = model_loss(model, batch)
    assert [s.numel() for s in seen] == [7]
    # transformers computes the loss in single precision
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-6, atol=0)
    for name, grad in gradients(model, found).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-5, atol=1e-7)


def test_a_masked_language_model_is_told_in_place():
    torch.manual_seed(0)
    model = hf.BertForMaskedLM(hf.BertConfig(**SIZES, **MLP, **NO_DROPOUT)).double().eval()
    batch = answers()
    seen, expected = widths(model), model(**batch).loss
    found = [model_loss(model, batch) for _ in range(2)]
    assert seen[-1].numel() == 7
    assert [float(f) for f in found] == pytest.approx([float(expected)] * 2, rel=1e-6)


def test_examples_are_observed_alike():
    model, batch = opt().double().eval(), answers()
    found = model_observe(model, batch)
    entropies = torch.nn.functional.cross_entropy(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        .logits[:, :-1]
        .movedim(-1, 1),
        batch["labels"][:, 1:],
        reduction="none",
    ).sum(1)
    torch.testing.assert_close(found.losses, entropies)
    assert found.counts.tolist() == [1, 2, 1, 3]


def smoothed(model):
    def loss(logits, labels, vocab_size, **_):
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
        )

    model.loss_function = loss
    return model


def routed(model):
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize(
    "make", [lambda: smoothed(causal("llama")), lambda: routed(causal("mixtral"))]
)
def test_a_loss_of_another_kind_stays_the_models_own(make):
    model, batch = make(), answers()
    for _ in range(2):
        assert counted_losses(model, batch) is None
        assert torch.equal(model_loss(model, batch), model(**batch).loss)


@pytest.mark.parametrize(
    "change",
    [
        {"num_items_in_batch": torch.tensor(20)},
        {"labels": torch.ones(4, 9, dtype=torch.long)},  # most labels count
        {"labels": torch.full((4, 9), -100)},
        {"labels": torch.tensor([0, 1, 0, 1])},
    ],
)
def test_batches_that_are_asked_as_a_whole(change):
    assert counted_losses(causal("llama"), answers() | change) is None


def test_the_try_leaves_nothing_behind():
    """Neither random numbers, nor modes, nor hooks, nor a use of a tapped projection."""
    model = opt().train()
    model.model.decoder.dropout = 0.3
    plain = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = plain(**answers()).loss
    biases = find_biases(model)
    with Tap(model, biases) as tap:
        sums = []
        for _ in range(2):  # in the first an announced step is under way
            tap.step(4, 7.0)
            torch.manual_seed(3)
            loss = model_loss(model, answers())
            assert float(loss) == pytest.approx(float(expected), rel=1e-5)
            loss.backward()
            sums.append([t.clone() for pair in tap.statistics().values() for t in pair])
        for first, both in zip(*sums, strict=True):
            torch.testing.assert_close(both, 2 * first)
    assert model.training and all(m.training for m in model.modules())
    assert not output_layer(model)._forward_pre_hooks


def test_a_compiled_model_is_never_hooked():
    """A hook that is there when code is compiled would stay in it."""
    model = causal("llama")
    compiled = torch.compile(model, backend="eager")
    inputs = {k: v for k, v in answers().items() if k != "labels"}
    whole = model(**inputs).logits.flatten(0, 1)
    for at in ([3], [1, 30], []):
        at = torch.tensor(at, dtype=torch.long)
        for asked in (compiled, model):
            torch.testing.assert_close(logits_at(asked, inputs, at)[0], whole[at])


def test_positions_count_from_where_the_texts_begin():
    """A learnt prompt before the texts is no position of the batch."""
    peft = pytest.importorskip("peft")
    model = causal("llama")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    prompted = peft.get_peft_model(model, config).double().eval()
    inputs = {k: v for k, v in answers().items() if k != "labels"}
    at = torch.tensor([0, 8, 17, 30])
    whole = prompted(**inputs).logits
    assert whole.shape[1] == 9 + 5
    torch.testing.assert_close(logits_at(prompted, inputs, at)[0], whole[:, 5:].flatten(0, 1)[at])


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_of_tokens(monkeypatch, at_once, dtype):
    monkeypatch.setattr(counted, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(7, 33, generator=generator)).to(dtype).requires_grad_()
    tokens = torch.randint(33, (7, 3), generator=generator)
    tokens[0] = tokens[0, 0]  # one token several times
    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1).gather(1, tokens)
    found = log_probabilities(logits, tokens)
    single = max(torch.finfo(dtype).eps, 2e-16) if dtype == torch.float64 else 1.2e-7
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    # Numbers up to 60; sums of 33.
    assert bool(((found - expected).abs() <= 8 * 60 * single).all())
    given = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    expected.backward(given)
    found.backward(given.to(found.dtype))
    assert bool(((logits.grad - exact.grad).abs() <= 8 * torch.finfo(dtype).eps * 8).all())
