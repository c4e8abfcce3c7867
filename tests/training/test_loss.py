"""Per-example statistics under every kind of mean: against a loop of one example at a time."""

import pytest
import torch
import transformers as hf
from conftest import SIZES, T5, tiny

from beft_ext import select
from beft_ext.training.loss import divisor

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}


def models():
    torch.manual_seed(0)
    bert = SIZES | NO_DROPOUT | {"intermediate_size": 48}
    return {
        "causal": hf.OPTForCausalLM(hf.OPTConfig(**SIZES, **OPT)),
        "masked": hf.BertForMaskedLM(hf.BertConfig(**bert)),
        "tokens": hf.BertForTokenClassification(hf.BertConfig(**bert, num_labels=3)),
        "choice": hf.BertForMultipleChoice(hf.BertConfig(**bert)),
        "several": hf.BertForSequenceClassification(
            hf.BertConfig(**bert, num_labels=3, problem_type="multi_label_classification")
        ),
    }


def batch_for(kind):
    generator = torch.Generator().manual_seed(1)

    def numbers(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    ids = numbers(64, 4, 7)
    if kind == "choice":
        return {"input_ids": numbers(64, 4, 3, 7), "labels": numbers(3, 4)}
    if kind == "several":
        return {"input_ids": ids, "labels": numbers(2, 4, 3).float()}
    labels = numbers(3 if kind == "tokens" else 64, 4, 7)
    labels[numbers(2, 4, 7).bool()] = -100
    labels[:, 3] = 1
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", models())
def test_fisher_is_that_of_one_example_at_a_time(kind):
    model, batch = models()[kind], batch_for(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    found = select(model, [batch], steps=1, lr=1e-9, clip=0.0)
    exact = model.double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    terms = {"query": "q_proj" if kind == "causal" else "query", "value": "v"}
    for term, part in terms.items():
        squares = {}
        for i in range(4):
            exact.zero_grad()
            one = {k: v[i : i + 1] for k, v in batch.items()}
            loss = exact(**one).loss * divisor(exact, one)
            loss.backward()
            own = [
                p.grad
                for n, p in exact.named_parameters()
                if part in n.split(".")[-2] and "bias" in n
            ]
            own = [g for g in own if g is not None][:2]
            for layer, grad in enumerate(own):
                squares[layer] = squares.get(layer, 0.0) + float(grad.square().mean()) / 4
        assert found.per_layer["example_fisher"][term] == pytest.approx(
            list(squares.values()), rel=1e-3
        )


def test_the_divisor_is_what_the_models_divide_by():
    """The loss of a batch times its divisor is the sum over examples of the same."""
    everything = models() | {
        "both": hf.T5ForConditionalGeneration(
            hf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0)
        ),
        "plain": tiny("bert"),
        "xlm": hf.XLMWithLMHeadModel(
            hf.XLMConfig(emb_dim=32, n_layers=1, n_heads=4, vocab_size=64, pad_index=0)
        ),
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
    }
    for kind, model in everything.items():
        batch = batch_for(kind)
        if kind == "plain":
            batch["labels"] = batch["labels"][:, 3] * 0 + 1
        model.eval()
        with torch.no_grad():
            whole = float(model(**batch).loss) * divisor(model, batch)
            rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
            parts = sum(float(model(**row).loss) * divisor(model, row) for row in rows)
        assert whole == pytest.approx(parts, rel=1e-5), kind
