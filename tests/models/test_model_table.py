"""docs/models.md and a sample of each family behind it: slices proved, adapters to and fro."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
from model_table import OUT, VARIANTS, Verdict, _row, page, quiet, verify
from tiny_models import class_name, inputs, tiny, types

from beft_ext import (
    BiasAdamW,
    BiasError,
    BiasMap,
    find_biases,
    load_adapter,
    prepare,
    save_adapter,
    select,
)
from beft_ext.adapters import term_facts
from beft_ext.models import add_bias, find_projections, head_parameters

# Of each way in which examples can lie, or a module can be used, a type; and of each layout.
SAMPLE = ["bert", "deberta-v2", "albert", "longformer", "dory", "prophetnet", "pegasus_x", "led"]
SAMPLE += ["gpt2", "gpt_neox", "falcon", "gpt_bigcode", "codegen", "gemma3", "gemma4_text"]
SAMPLE += ["mobilebert", "deepseek_v3", "mixtral", "t5", "whisper", "vit", "fsmt", "cpmant"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models are tiny
    quiet()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SAMPLE)
def test_slices_and_second_moments(name):
    for variant, own in {"": None, **VARIANTS.get(name, {})}.items():
        verdict = verify(name, own, f"{name} ({variant})" if variant else name)
        assert verdict.proved, verdict.why
        if f"transformers {transformers.__version__}:" in OUT.read_text(encoding="utf-8"):
            assert verdict in on_the_page()


def test_the_proof_notices_statistics_of_wrong_rows(monkeypatch):
    """Squares of the batch's sum, a row too many, a use forgotten: each is called unproved."""
    from beft_ext.tap import Tap

    right = Tap.statistics
    for wrong in (
        lambda total, squares: (total, total.square() / 2),
        lambda total, squares: (total, squares * (1 + 1e-5)),
        lambda total, squares: (total * (1 + 1e-5), squares),
        lambda total, squares: (total, squares.roll(1)),
    ):
        monkeypatch.setattr(
            Tap,
            "statistics",
            lambda tap, wrong=wrong: {b: wrong(*s) for b, s in right(tap).items()},
        )
        verdict = verify("opt")
        assert not verdict.proved and "is off by" in verdict.why


def test_a_row_alone_has_lost_its_padding():
    batch = inputs(tiny("t5", torch.float64))
    row = _row(batch, 1, cut=True)
    assert row["input_ids"].shape == (1, 5) and row["labels"].shape == (1, 6)
    assert row["attention_mask"].all() and (row["labels"] != -100).all()
    assert _row(batch, 1, cut=False)["input_ids"].shape == (1, 7)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "voxtral"])
def test_towers_beside_a_text_model_have_no_term(name):
    """No text reaches a bias of what sees or hears."""
    model = tiny(name, torch.float32)
    batch = inputs(model)
    reached = {p.bias.module for p in find_projections(model)}
    ran = set()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.add(path))
    model(**batch)
    assert reached <= ran
    assert not any("vision" in path or "audio" in path for path in reached)


GATED = ["llama", "gemma", "qwen2", "mistral", "phi3", "glm", "modernbert", "lfm2", "mt5", "bamba"]


@pytest.mark.parametrize("name", GATED)
def test_a_closed_gate_lets_nothing_through(name):
    """What the gate's bias moves goes through the activation: far below zero, it is zero."""
    model = tiny(name, torch.float64)
    projections = find_projections(model)
    down = {p.bias.module for p in projections if p.bias.term == "mlp_down"}
    for term, opened in (("mlp_gate", False), ("mlp_up", True)):
        places = [p.bias for p in projections if p.bias.term == term]
        given = []
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda _, args, given=given: given.append(args[0])
            )
            for path in down
        ]
        for bias in places:
            added = add_bias(model, bias.module)
            with torch.no_grad():
                bias.view(added).fill_(-1e3)
        with torch.no_grad():
            model(**inputs(model))
        for hook in hooks:
            hook.remove()
        for bias in places:
            model.get_submodule(bias.module).bias = None
        assert len(places) == len(down) and len(given) >= len(down)
        assert all(bool(x.abs().max() > 1) == opened for x in given)


@pytest.mark.parametrize(
    "name", ["falcon", "phi3", "bloom", "bart", "whisper", "mpt", "deepseek_v3"]
)
def test_adapters_of_every_layout(name, tmp_path):
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


@pytest.mark.parametrize(("name", "places"), [("mobilebert", 4), ("axk2", 2)])
def test_several_biases_of_a_term_in_a_layer_are_told_apart(name, places, tmp_path):
    """Each keeps its own values: in the adapter, in training that goes on, in the scores."""
    model = tiny(name, torch.float32)
    base, batch = copy.deepcopy(model), inputs(model)
    prepared = prepare(model, "mlp_up")
    names = [b.name for b in prepared.biases]
    assert names[:places] == ["0.mlp_up", *(f"0.mlp_up.{i}" for i in range(1, places))]
    assert len(set(names)) == len(names) == len(prepared.initial)
    facts = next(f for f in term_facts(base) if f.term == "mlp_up")
    for printed in (prepared, BiasMap(prepared.biases), facts):
        assert re.search(rf"mlp_up +{len(prepared.layers)} ", str(printed))
    optimizer = BiasAdamW(model, lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()
    assert set(names) <= set(optimizer.scores())
    with torch.no_grad():
        for number, bias in enumerate(prepared.biases):
            model.get_parameter(bias.parameter).fill_(number + 1)
    save_adapter(model, tmp_path)
    going_on = copy.deepcopy(base)
    prepare(going_on, "mlp_up")
    for fresh in (base, going_on):
        load_adapter(fresh, tmp_path, trainable=fresh is going_on)
        for number, bias in enumerate(prepared.biases):
            value = fresh.get_parameter(bias.parameter)
            assert torch.allclose(value, torch.full_like(value, number + 1))


def test_a_selection_keeps_several_biases_of_a_term_in_a_layer(tmp_path):
    torch.manual_seed(0)
    model = tiny("mobilebert", torch.float32)
    biases = [b for b in find_biases(model) if b.term == "mlp_up"]
    selection = select(model, [inputs(model)], "magnitude", terms="mlp_up", steps=2)
    selection.save(tmp_path)
    kept = load_file(tmp_path / "biases.safetensors")
    assert len(kept) == 2 * len(biases)
    moved = {}
    for bias in biases:
        initial, current = (kept[f"{when}/{bias.name}"] for when in ("initial", "current"))
        assert initial.equal(model.get_parameter(bias.parameter))
        moved.setdefault(bias.layer, []).append(float((current - initial).abs().mean()))
    layers = [sum(own) / len(own) for own in moved.values()]
    assert len(layers) == 2
    assert selection.per_layer["magnitude"]["mlp_up"] == pytest.approx(layers, rel=1e-5)
    assert selection.scores["magnitude"]["mlp_up"] == pytest.approx(sum(layers) / 2, rel=1e-5)


def on_the_page():
    """The verdicts that the committed page lists."""
    lines = OUT.read_text(encoding="utf-8").splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    found = [
        Verdict(name, model, _terms(terms), _terms(added), layout, padding, True)
        for name, model, terms, added, layout, padding in (r for r in rows if len(r) == 6)
        if name not in SKIPPED
    ]
    return found + [
        Verdict(r[0], "", why=r[1]) for r in rows if len(r) == 2 and r[0] not in SKIPPED
    ]


def test_the_page_is_the_generated_one():
    """Read back into verdicts, the committed page is what the script writes of them. That they
    are right is proved anew for SAMPLE alone; ``make docs`` proves all of them."""
    text, found = OUT.read_text(encoding="utf-8"), on_the_page()
    written = re.sub(r"transformers \S+:", "", page(found))
    assert written == re.sub(r"transformers \S+:", "", text)
    if f"transformers {transformers.__version__}:" in text:
        assert {v.name.partition(" ")[0] for v in found} == set(types())


SKIPPED = ("type", "---")


def _terms(cell):
    return () if cell == "none" else tuple(cell.split(", "))


def test_the_page_lists_the_types_that_are_promised():
    text = OUT.read_text(encoding="utf-8")
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
