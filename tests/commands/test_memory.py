"""docs/memory.md: what a tapped training step keeps for backward, to the byte; a 6.7B decoder."""

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import float32 as single

from beft_ext import Tap, find_biases, prepare
from beft_ext.commands.memory import peak_bytes

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SIZES = {"layers": 2, "width": 32, "batch": 2, "tokens": 8, "dtype": single, "padded": False}
CHANGES = [{}, {"layers": 3}, {"width": 64}, {"batch": 5}, {"tokens": 24}, {"padded": True}]
CASES = [SIZES | c | {"dtype": d} for c in CHANGES for d in (single, torch.bfloat16)]


def opt_bytes(c, batch, tokens, size, padded, statistic, dropout):
    """Bytes that OPT keeps. size: of an element; statistic: of a norm's mean and deviation;
    dropout: of an element of a dropout's mask."""
    n, width = batch * tokens, c.hidden_size
    norm = n * (size * width + 2 * statistic)
    attention = n * (4 * size * width + 4 * c.num_attention_heads)
    mlp = n * size * c.ffn_dim
    mask = padded * size * batch * tokens**2
    layer = 2 * norm + attention + mlp + mask + 2 * n * width * dropout
    # Nothing below the first tap trains: its norm keeps nothing. One norm stands at the end.
    return c.num_hidden_layers * layer - norm + norm + loss_bytes(c, n)


def llama_bytes(c, batch, tokens, size, padded, *_):
    """Bytes that LLaMA keeps. Its norms work in fp32; a padding mask makes transformers repeat
    key and value for every query head; cosines and sines are kept once."""
    n, width = batch * tokens, c.hidden_size
    key_value = (c.num_attention_heads if padded else c.num_key_value_heads) * c.head_dim
    norm = n * (4 * width + 4)
    attention = n * (2 * size * width + 2 * size * key_value + 4 * c.num_attention_heads)
    mlp = 3 * n * size * c.intermediate_size
    mask = padded * size * batch * tokens**2
    layer = 2 * norm + attention + mlp + mask
    rotary = 2 * size * tokens * c.head_dim
    return c.num_hidden_layers * layer + rotary + loss_bytes(c, n)


def loss_bytes(c, n):
    """Log-probabilities in fp32, labels, and the number of tokens that count."""
    return n * (4 * c.vocab_size + 8) + 4


def opt(layers, width, vocabulary=96, heads=4):
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "dropout": 0.1}
    return hf.OPTConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=64)


def llama(layers, width, vocabulary=96):
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return hf.LlamaConfig(**sizes, **heads, vocab_size=vocabulary)


def model_and_batch(config, case):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(case["dtype"]).train()
    model.config.use_cache = False
    if config.model_type == "llama":
        prepare(model, ("query", "key", "value"))
    ids = torch.randint(3, 96, (case["batch"], case["tokens"]))
    mask = torch.ones_like(ids)
    if case["padded"]:
        mask[0, -3:] = 0
    return model, {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}


def kept(model, batch, biases):
    """Bytes of the storages that autograd keeps, but for the model's own."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage
        return tensor

    model.requires_grad_(False)
    with Tap(model, biases) as tap, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tap.step(len(batch["input_ids"]), 1.0)
        loss = model(**batch).loss
        assert loss.requires_grad
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("terms", [("query", "key", "value"), ("value",)], ids="+".join)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize(("make", "formula"), [(opt, opt_bytes), (llama, llama_bytes)])
def test_what_is_kept_is_what_the_formula_says_to_the_byte(make, formula, case, terms):
    config = make(case["layers"], case["width"])
    model, batch = model_and_batch(config, case)
    biases = [b for b in find_biases(model) if b.term in terms]
    size = case["dtype"].itemsize
    # On the CPU a norm's statistics have its own dtype, and so has a dropout's mask.
    expected = formula(config, *batch["input_ids"].shape, size, case["padded"], size, size)
    assert kept(model, batch, biases) == expected


def in_flight(c, n, size):
    """Bytes beside them at the peak, the loss: logits and their gradients, in fp32 and not."""
    return n * c.vocab_size * (2 * 4 + size)


@pytest.mark.parametrize("dtype", [single, torch.bfloat16])
def test_the_peak_of_a_step_is_within_the_sum(dtype):
    case = SIZES | {"dtype": dtype, "batch": 8, "tokens": 32}
    config = opt(4, 64, vocabulary=12 * 64)  # as many rows of logits to the width as in OPT-6.7B
    model, batch = model_and_batch(config, case)
    biases = find_biases(model)
    model.requires_grad_(False)
    with Tap(model, biases) as tap:

        def step():
            tap.step(8, 1.0)
            model(**batch).loss.backward()

        step()
        found = peak_bytes(step, "cpu")
    size, n = dtype.itemsize, 8 * 32
    expected = opt_bytes(config, 8, 32, size, False, size, size) + in_flight(config, n, size)
    assert 0.85 * expected < found < 1.02 * expected


def test_a_decoder_of_seven_billion_parameters_fits_in_80_gigabytes():
    """OPT-6.7B in bf16 at 8 x 512 tokens, padded; on a GPU a norm's statistics are fp32 and a
    dropout's mask is one byte an element."""
    config = opt(32, 4096, vocabulary=50272, heads=32)
    config.max_position_embeddings = 2048
    with torch.device("meta"):
        weights = 2 * sum(p.numel() for p in hf.OPTForCausalLM(config).parameters())
    saved = opt_bytes(config, 8, 512, 2, True, 4, 1)
    flying = in_flight(config, 8 * 512, 2)
    parts = {"weights": weights, "kept for backward": saved, "in flight": flying}
    parts["all"] = sum(parts.values())
    assert parts["all"] < 80e9
    text = PAGE.read_text()
    for name, value in parts.items():
        assert float(re.search(rf"\| {name} \| ([\d.]+) GB", text)[1]) == round(value / 1e9, 1)
