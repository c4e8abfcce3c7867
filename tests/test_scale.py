"""docs/scale.py: bytes of a selection by formula against the tensors that it makes; the page."""

import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import batch

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import scale

from beft_ext import Tap
from beft_ext.gains import Gram
from beft_ext.parallel import Ranks
from beft_ext.selection.candidates import added, candidates_of
from beft_ext.selection.evidence import Collector
from beft_ext.selection.run import Run
from beft_ext.training.observed import model_observe


def opt(layers, width):
    config = hf.OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, vocab_size=64, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return config, scale.opt("small", layers, width, 64)


def llama(layers, width):
    config = hf.LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    return config, scale.llama("small", layers, width, width // 2, 3 * width, 64)


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def of_slab(slab):
    own = [slab.whole]
    for kept in slab.kept.values():
        own += [kept.table, kept.scales]
        own += [] if kept.fold is None else [kept.fold.order, kept.fold.sign]
        own += [] if kept.turn is None else [kept.turn.sign]
    return [t for t in own if t is not None]


SHAPES = [(opt, 3, 64), (opt, 6, 32), (llama, 3, 64), (llama, 4, 128)]


@pytest.mark.parametrize("kind, layers, width", SHAPES)
@pytest.mark.parametrize("examples, share", [(24, 1), (48, 1), (48, 0.6), (48, 0.25), (48, 1 / 8)])
def test_bytes_of_a_selection(kind, layers, width, examples, share):
    """share: of the bytes that the rows would take."""
    config, shape = kind(layers, width)
    memory = share * 4 * examples * shape.elements
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    names, lacking = candidates_of(model, "+".join(shape.widths), None, every=True)
    batches = [batch(8, seed=i) for i in range(examples // 8)]
    with added(model, lacking):
        model.requires_grad_(False)
        with Tap(model, names) as tap:
            collector = Collector(model, tap, names, model_observe, examples, memory, 0, Ranks())
            with collector.listening():
                collector.read(iter(batches), examples)
                evidence = collector.evidence()
            rows = nbytes(t for site in tap.sites for t in of_slab(site.slab))
            sums = nbytes(t for site in tap.sites for t in (site.grad_sum, site.grad_sum_sq))
        with Tap(model, names) as tap:
            run = Run(model, tap, steps=1)
            run.train(batches, progress=False)
            state = nbytes(t for flat in run.optimizer._flats for t in (flat.state,))
            grads = nbytes(leaf.grad for _, leaf in tap.leaves())
            head = [p for p in model.parameters() if p.requires_grad]
    assert (collector.columns is not None) == (share == 1 / 8)
    assert rows == pytest.approx(scale.rows_bytes(shape, examples, memory=memory), rel=0.05)
    assert sums == pytest.approx(scale.statistics_bytes(shape), rel=0.05)
    bands = [k for own in evidence.grams.values() for k in own.values()]
    # In the making each is as large as it is whole, with one rank.
    vectors = [Gram.of(evidence.of_term(t)).vectors for t in evidence.grams]
    grams = 2 * nbytes(bands) + nbytes(vectors)
    assert grams == pytest.approx(scale.gram_bytes(shape, examples), rel=0.05)
    single = scale.Shape(**{**vars(shape), "size": 4})
    run_total = sums + grads + state - 3 * nbytes(head)
    assert run_total == pytest.approx(scale.run_bytes(single), rel=0.05)


@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_are_divided_among_ranks(ranks):
    shape = scale.opt("small", 3, 64)
    assert scale.rows_bytes(shape, 30, ranks) == scale.rows_bytes(shape, 30) // ranks


@pytest.mark.parametrize("kind, layers, width", SHAPES)
def test_operations_are_those_that_torch_counts(kind, layers, width):
    """Forward, and backward to the first bias, of the matrices and the attention."""
    from torch.utils.flop_counter import FlopCounterMode

    config, shape = kind(layers, width)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.requires_grad_(False)
    inputs = model.get_input_embeddings()(batch(2, 32)["input_ids"]).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs).logits.sum().backward()
    counted = counter.get_total_flops() / (2 * 32)
    assert counted == pytest.approx(scale.token_operations(shape, 32), rel=0.05)


def test_the_page_is_what_the_formulas_say():
    text = scale.PAGE.read_text(encoding="utf-8")
    assert text.count(scale.BEGIN) == text.count(scale.END) == 1
    assert text.partition(scale.BEGIN)[2].partition(scale.END)[0] == scale.section()
