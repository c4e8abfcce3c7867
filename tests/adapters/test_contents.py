"""What an adapter's files say of it, and that nothing is read before it is checked."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from conftest import CONFIGS, SIZES, logits, tiny, train, values
from safetensors.torch import load_file, save_file
from torch import nn

from beft_ext import AdapterError, load_adapter, prepare, save_adapter
from beft_ext.adapters.contents import class_facts, head_modules, head_state, model_facts
from beft_ext.adapters.reading import class_names, head_classes, model_class

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path):
    model = tiny("bert")
    prepare(model, "value")
    train(model, steps=1)
    save_adapter(model, tmp_path)
    return tmp_path


def reconfigure(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def rewrite(folder, change):
    """Without digests: as PEFT writes it."""
    tensors = {n: t.clone() for n, t in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("length", [16 * 2**20, 16 * 2**20 + 1])
def test_a_header_of_more_than_16_mib_is_not_read(adapter, length):
    """Whole, and no larger than safetensors allows; its bytes are spaces."""
    path = adapter / WEIGHTS
    rewrite(adapter, lambda tensors: None)
    data = path.read_bytes()
    own = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + own].ljust(length), data[8 + own :]
    path.write_bytes(length.to_bytes(8, "little") + header + rest)
    assert load_file(path)
    if length > 16 * 2**20:
        with pytest.raises(
            AdapterError, match=rf"{length + 8 + len(rest)} bytes, of which {length}"
        ):
            load_adapter(tiny("bert"), adapter)
        with pytest.raises(AdapterError, match=f"of which {length} are header"):
            head_classes(adapter)
    else:
        load_adapter(tiny("bert"), adapter)


@pytest.mark.parametrize("data", [b"", bytes(7), (9).to_bytes(8, "little") + bytes(8)])
def test_a_file_without_room_for_its_header_is_not_read(adapter, data, monkeypatch):
    """safetensors never sees it."""
    (adapter / WEIGHTS).write_bytes(data)
    monkeypatch.setattr("safetensors.safe_open", None)
    with pytest.raises(AdapterError, match=f"{len(data)} bytes, of which [09] are header"):
        load_adapter(tiny("bert"), adapter)


def test_targets_are_whole_names_or_their_ends(adapter):
    """As PEFT reads them: ``value`` is the end of ``self.value``, and ``alue`` is of none."""
    one = "bert.encoder.layer.0.attention.self.query"
    for asked, lacking in (
        (["query"], one),
        (["self.query", ""], one),
        ([one], one),
        ([one.replace(".0.", ".1.")], one.replace(".0.", ".1.")),
        (["alue", "uery", "", "no.such.module"], None),
        (r".*(query|value)", None),
    ):
        reconfigure(adapter, target_modules=asked)
        rewrite(adapter, lambda tensors: None)
        if lacking:
            with pytest.raises(AdapterError, match=f"the adapter lacks '{lacking}.beft_bias'"):
                load_adapter(tiny("bert"), adapter)
        else:
            load_adapter(tiny("bert"), adapter)


def test_a_kept_module_is_found_by_the_end_of_its_name(adapter):
    """As PEFT wraps it, whole components or not."""
    for saved in (["classifier"], ["fier"], ["", "classifier"]):
        reconfigure(adapter, modules_to_save=saved)
        rewrite(adapter, lambda tensors: None)
        model = tiny("bert")
        load_adapter(model, adapter)
        want = load_file(adapter / WEIGHTS)["base_model.model.classifier.weight"]
        assert torch.equal(model.classifier.weight, want)
    for saved in (None, [], ["", "pooler"]):
        reconfigure(adapter, modules_to_save=saved)
        rewrite(adapter, lambda tensors: None)
        with pytest.raises(AdapterError, match=r"'classifier.\w+' is neither a bias nor in a head"):
            load_adapter(tiny("bert"), adapter)


def test_an_adapter_of_a_head_alone_is_none(adapter):
    reconfigure(adapter, target_modules=[])
    rewrite(adapter, lambda t: [t.pop(n) for n in list(t) if n.endswith("beft_bias")])
    with pytest.raises(AdapterError, match="holds no bias"):
        load_adapter(tiny("bert"), adapter)


def test_an_adapter_of_another_model_names_what_differs(adapter):
    other = hf.BertConfig(**SIZES | {"num_hidden_layers": 3}, intermediate_size=48)
    model = hf.AutoModelForSequenceClassification.from_config(other)
    before = values(model)
    with pytest.raises(AdapterError, match=r"num_hidden_layers 2, but BertForSeq.* has 3"):
        load_adapter(model, adapter)
    assert all(torch.equal(t, before[n]) for n, t in values(model).items())
    with pytest.raises(AdapterError, match=r"model_type 'bert', but Roberta.* has 'roberta'"):
        load_adapter(tiny("roberta"), adapter)


def test_facts_are_those_that_the_config_has():
    model = nn.Linear(2, 2)
    assert model_facts(model) == class_facts(model) == {}
    model.config = SimpleNamespace(model_type="own", hidden_size=2.5, id2label={0: "a", 1: "b"})
    assert model_facts(model) == {"model_type": "own"}
    assert class_facts(model) == {"classes": ["a", "b"]}
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    assert class_facts(model) == {}
    model.config.id2label = {0: "LABEL_0", 1: "good"}
    assert class_facts(model) == {"classes": ["LABEL_0", "good"]}


def test_the_folder_tells_the_class_its_names_and_its_task(tmp_path):
    """Before any model is made."""
    tasks = {
        "BertForSequenceClassification": ("SEQ_CLS", 2),
        "BertForTokenClassification": ("TOKEN_CLS", 2),
        "BertForQuestionAnswering": ("QUESTION_ANS", 2),
        "BertForMultipleChoice": (None, 1),
    }
    config = CONFIGS["bert"]()
    config.id2label = {0: "bad", 1: "good"}
    for name, (task, classes) in tasks.items():
        model = getattr(hf, name)(config)
        prepare(model, "value")
        save_adapter(model, tmp_path / name)
        written = json.loads((tmp_path / name / CONFIG).read_text())
        assert written["task_type"] == task and written["peft_type"] == "BEFT"
        assert model_class(tmp_path / name) == name
        assert class_names(tmp_path / name) == ["bad", "good"]
        assert head_classes(tmp_path / name) == classes
    for kind, config in ((hf.GPT2LMHeadModel, CONFIGS["gpt2"]()), (hf.OPTForCausalLM, None)):
        model = kind(config or CONFIGS["opt"]())
        prepare(model, "value")
        save_adapter(model, tmp_path / "lm")
        written = json.loads((tmp_path / "lm" / CONFIG).read_text())
        assert written["task_type"] == "CAUSAL_LM" and written["modules_to_save"] is None
        assert head_classes(tmp_path / "lm") is None and class_names(tmp_path / "lm") == []
    for name in ("Trainer", "no_such_class", 7, None):
        reconfigure(tmp_path / "lm", auto_mapping={"base_model_class": name})
        assert model_class(tmp_path / "lm") is None
    reconfigure(tmp_path / "lm", auto_mapping=["BertModel"])
    assert model_class(tmp_path / "lm") is None and class_names(tmp_path / "lm") == []


def test_head_modules_are_the_outermost_that_hold_nothing_else():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.ModuleDict()})
    model["head"]["a"] = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model["head"]["b"] = nn.Linear(2, 2)
    names = [n for n, _ in model.named_parameters()]
    inner = [n for n in names if n.startswith("head.a.")]
    assert head_modules(model, [n for n in names if n.startswith("head.")]) == ["head"]
    assert head_modules(model, inner) == ["head.a"]
    assert head_modules(model, [n for n in inner if ".0." in n]) == ["head.a.0"]
    assert head_modules(model, []) == [] and head_state(model, []) == {}
    for some in (["head.b.bias"], [*inner, "head.b.bias"]):
        with pytest.raises(AdapterError, match=r"'head.b.bias' shares its module with frozen ones"):
            head_modules(model, some)


def test_buffers_of_a_head_are_kept(tmp_path):
    """Such as the statistics of a batch norm."""
    model, again = tiny("bert"), tiny("bert")
    for one in (model, again):
        one.classifier = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2)).eval()
    prepare(model, "value")
    train(model)
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    assert torch.equal(again.classifier[0].running_mean, model.classifier[0].running_mean)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_differences_are_at_least_single_precision(tmp_path, dtype):
    """Two terms of one fused parameter lie in one difference, each at its place."""
    model = tiny("gpt2").to(dtype)
    base = values(model)
    prepare(model, ("query", "value"))
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.attn.c_attn.bias[:32] += 0.5
            layer.attn.c_attn.bias[64:] -= 0.25
    save_adapter(model, tmp_path)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for i in range(2):
        name = f"transformer.h.{i}.attn.c_attn"
        found = load_file(tmp_path / WEIGHTS)[f"base_model.model.{name}.beft_bias"]
        after, before = model.get_parameter(f"{name}.bias").detach(), base[f"{name}.bias"]
        want = after.double() - before.double()
        assert found.shape == (1, 96) and found.dtype == wide
        assert torch.equal(found[0], want.to(wide)) and bool(want[:32].all() and want[64:].all())
        assert not want[32:64].any()
