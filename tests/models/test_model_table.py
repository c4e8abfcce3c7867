"""docs/models.md and a sample of each family behind it: slices proved, adapters to and fro."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
from model_table import OUT, VARIANTS, class_name, inputs, quiet, tiny, verify

from beft_ext import BiasError, find_biases, load_adapter, prepare, save_adapter
from beft_ext.models import find_projections, head_parameters

SAMPLE = ["bert", "deberta-v2", "albert", "longformer", "modernbert", "opt", "gpt2", "gpt_neox"]
SAMPLE += ["bloom", "falcon", "mpt", "gpt_bigcode", "phi3", "codegen", "llama", "qwen3", "gpt_oss"]
SAMPLE += ["deepseek_v3", "mixtral", "qwen3_next", "t5", "bart", "led", "whisper", "vit"]


@pytest.mark.parametrize("name", SAMPLE)
def test_every_slice_is_what_it_is_called(name):
    with quiet():
        for own in (None, *VARIANTS.get(name, {}).values()):
            verdict = verify(name, own)
            assert verdict.proved, verdict.why


@pytest.mark.parametrize(
    "name", ["falcon", "phi3", "bloom", "bart", "whisper", "mpt", "deepseek_v3"]
)
def test_adapters_of_every_layout(name, tmp_path):
    with quiet():
        model = tiny(name, torch.float32)
    fresh, batch = copy.deepcopy(model), inputs(model)
    terms = [
        t
        for t in ("value", "cross_value")
        if any(p.bias.term == t for p in find_projections(model))
    ]
    prepared = prepare(model, terms)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**batch).logits, model(**batch).logits)
    for bias in prepared.biases:
        moved = bias.read(model.get_parameter(bias.parameter)) != prepared.initial[bias.name]
        assert moved.float().mean() > 0.5


def test_the_page_lists_what_was_verified():
    text = OUT.read_text()
    count = int(re.search(r"\*\*(\d+) types verified\*\*", text)[1])
    rows = text.partition("## Not verified")[0].splitlines()
    names = {r.split("|")[1].strip().partition(" ")[0] for r in rows if r.startswith("| ")} - {
        "type"
    }
    assert count == len(names - {"---"}) >= 60
    peft = pytest.importorskip("peft.utils.constants", reason="peft is not installed")
    known = set(peft.TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING)
    assert len(known) >= 19 and known <= names
    promised = {"gpt2", "gpt_neox", "bloom", "falcon", "mpt", "gpt_bigcode", "phi3", "modernbert"}
    assert promised | {"glm", "bart", "whisper", "mixtral", "qwen2_moe", "vit"} <= names


@pytest.mark.parametrize("name", ["falcon_mamba", "rwkv", "fnet"])
def test_a_model_without_attention_projections(name):
    with quiet():
        import transformers

        config = transformers.AutoConfig.for_model(name, hidden_size=32, num_hidden_layers=2)
        with torch.device("meta"):
            model = getattr(transformers, class_name(name))(config)
    with pytest.raises(BiasError, match="no layer with known query, key and value"):
        find_biases(model)


def test_what_a_head_is():
    """A task head trains; output embeddings, tied or not, do not."""
    import transformers as hf

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = hf.BertConfig(**sizes, intermediate_size=48, vocab_size=64)
    for kind in ("SequenceClassification", "MultipleChoice", "QuestionAnswering"):
        assert head_parameters(getattr(hf, f"BertFor{kind}")(bert))
    for tied in (True, False):
        llama = hf.LlamaConfig(
            **sizes, intermediate_size=48, vocab_size=64, tie_word_embeddings=tied
        )
        assert not head_parameters(hf.LlamaForCausalLM(llama))
    assert not head_parameters(tiny("bart", torch.float32))
