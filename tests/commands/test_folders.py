"""Folders of models as people have them: neighbours change no answer, and no folder a traceback."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as hf
from conftest import GPT2, MLP, SIZES, T5

from beft_ext.commands.cli import main
from beft_ext.commands.loading import Folder, ModelSpec, WorkflowError
from beft_ext.tasks import DataError, Task

MARKS = ["<s>", "<pad>", "</s>", "<unk>"]
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
TOKENS = [*MARKS, *"abcdefghijklmnopqrstuvwxyz "]
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TABLE = {"max_position_embeddings": 40}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 64}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
CONFIGS = {
    "bert": lambda: hf.BertConfig(**SIZES, **MLP, **TABLE, **IDS),
    "roberta": lambda: hf.RobertaConfig(**SIZES, **MLP, **TABLE, **IDS, type_vocab_size=1),
    "mpnet": lambda: hf.MPNetConfig(**SIZES, **MLP, **TABLE, **IDS),
    "gpt2": lambda: hf.GPT2Config(**GPT2, **IDS, n_positions=40),
    "opt": lambda: hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, **TABLE, **IDS),
    "llama": lambda: hf.LlamaConfig(**SIZES, **MLP, **TABLE, **IDS, num_key_value_heads=2),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64, **IDS),
    "xlnet": lambda: hf.XLNetConfig(**XLNET, **IDS),
    "t5": lambda: hf.T5Config(**T5, decoder_start_token_id=1, pad_token_id=1, eos_token_id=2),
    "bart": lambda: hf.BartConfig(**BART, **TABLE, **IDS, decoder_start_token_id=2),
}
ENCODERS, DECODERS = ("bert", "roberta", "mpnet"), ("gpt2", "opt", "llama", "bloom")
BOTH = ("t5", "bart")
ROWS = [{"text": t, "label": i % 2} for i, t in enumerate(("ab", "a long text of letters", "x y"))]


def letters(ends, **special):
    """A tokenizer of letters; ends: text stands between <s> and </s>, or </s> alone is added."""
    found = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="<unk>")
    )
    found.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    if ends:
        marks = [("<s>", 0), ("</s>", 2)]
        found.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{ends[0]} $A {ends[1]}", pair="$A $B:1 </s>:1", special_tokens=marks
        )
    return hf.PreTrainedTokenizerFast(tokenizer_object=found, **special)


def save(folder, name, ends=None, special=SPECIAL, classes=3, **config):
    """A tiny classifier whose biases and normalisations are not those of a new model."""
    if ends is None:
        ends = () if name in DECODERS else ("<s>", "</s>")
    letters(ends, **special).save_pretrained(folder)
    torch.manual_seed(0)
    made = CONFIGS[name]()
    made.num_labels = classes
    model = hf.AutoModelForSequenceClassification.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    change(folder, "config.json", **config)
    return str(folder)


def change(folder, file, **values):
    path = Path(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def answers(folder, rows, size, **task):
    """Logits of each row in batches of ``size``, in the rows' order."""
    asked = Task(text="{text}", **task)
    model, objective = ModelSpec(folder, "head").load(asked, 3)
    batches = objective.held_out(asked.examples(rows, ""), size)
    found = [None] * len(rows)
    for plan, batch in zip(batches.plan(), batches, strict=True):
        batch.pop("labels")
        with torch.no_grad():
            for i, row in zip(plan, model.eval()(**batch).logits, strict=True):
                found[i] = row
    return torch.stack(found)


def apart(folder, rows=ROWS, **task):
    """The largest difference that neighbours make, and the least difference of two rows."""
    alone, together = (answers(folder, rows, size, **task) for size in (1, len(rows)))
    assert alone.isfinite().all()
    return float((alone - together).abs().max()), float((alone[0] - alone[1]).abs().max())


def require_alone(folder, **task):
    between, rows = apart(folder, **task)
    # Half a dozen layers of sums of some fifty terms in fp32, values of order one.
    assert between < 2e-5 and rows > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_neighbours_change_no_answer(tmp_path, name, side):
    folder = save(tmp_path, name)
    change(folder, "tokenizer_config.json", padding_side=side)
    require_alone(folder)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pad", [None, 0, 3, 7, -1, 999])
def test_the_config_has_another_padding_token(tmp_path, name, pad):
    folder = save(tmp_path, name, pad_token_id=pad)
    if name in ("roberta", "mpnet") and pad == 7:  # positions count from an ordinary letter
        with pytest.raises(WorkflowError, match="ordinary token"):
            answers(folder, ROWS, 1)
    else:
        require_alone(folder)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pad", [None, 1, -1])
def test_the_tokenizer_has_no_padding_token(tmp_path, name, pad):
    special = {k: v for k, v in SPECIAL.items() if k != "pad_token"}
    require_alone(save(tmp_path, name, special=special, pad_token_id=pad))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokenizer_gives_no_mask(tmp_path, name):
    folder = save(tmp_path, name)
    change(folder, "tokenizer_config.json", model_input_names=["input_ids"])
    require_alone(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_text_has_an_answer(tmp_path, name):
    rows = [*ROWS, {"text": "", "label": 0}]
    between, _ = apart(save(tmp_path, name), rows)
    assert between < 2e-5


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_pairs_have_types_that_the_model_knows(tmp_path, name):
    folder = save(tmp_path, name)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    change(folder, "tokenizer_config.json", model_input_names=names)
    require_alone(folder, pair="{text}")


@pytest.mark.parametrize("name", DECODERS)
def test_no_padding_token_to_be_had(tmp_path, name):
    folder = save(tmp_path, name, special={}, pad_token_id=None)
    with pytest.raises(WorkflowError, match="pad_token in tokenizer_config"):
        answers(folder, ROWS, 1)


@pytest.mark.parametrize(
    ("name", "room"), [("bert", 40), ("roberta", 38), ("opt", 40), ("gpt2", 40)]
)
@pytest.mark.parametrize("limit", [10**30, "many", None, 0])
def test_texts_are_cut_to_the_position_table(tmp_path, name, room, limit):
    folder = save(tmp_path, name)
    change(folder, "tokenizer_config.json", model_max_length=limit)
    task = Task(text="{text}")
    model, objective = ModelSpec(folder, "head", max_length=1000).load(task, 3)
    rows = [{"text": "a" * n, "label": 0} for n in (35, 60)]
    (batch,) = objective.held_out(task.examples(rows, ""), 2)
    assert batch["input_ids"].shape == (2, room) and len(objective.notes) == 1
    assert model(**batch).logits.isfinite().all()


def test_the_tokenizers_own_limit_counts_too(tmp_path):
    folder = save(tmp_path, "opt")
    change(folder, "tokenizer_config.json", model_max_length=9)
    assert ModelSpec(folder, "head").load(Task(text=""), 3)[1].longest == 9
    prompted = Task(text="", prompt="{text}", options=("a", "b"))
    spec = ModelSpec(causal(folder), "prompt")
    assert spec.load(prompted)[1].longest == 9


def causal(folder):
    hf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    return folder


def test_what_is_not_of_one_model_is_refused(tmp_path):
    shutil.copytree(save(tmp_path / "a", "bert"), tmp_path / "b")
    letters((), **SPECIAL, extra_special_tokens=[f"<{i}>" for i in range(40)]).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(WorkflowError, match="tokenizer has 71 tokens and the model embeds 64"):
        answers(str(tmp_path / "a"), ROWS, 1)
    change(tmp_path / "b", "config.json", model_type="electra", embedding_size=32)
    with pytest.raises(WorkflowError, match="weights lack 'electra"):
        answers(str(tmp_path / "b"), ROWS, 1)


@pytest.mark.parametrize(
    ("left", "kind"),
    [
        ("regression", "classification"),
        ("multi_label_classification", "classification"),
        ("single_label_classification", "regression"),
        (None, "regression"),
    ],
)
def test_the_problem_of_another_task_is_forgotten(tmp_path, left, kind):
    folder = save(tmp_path, "bert", problem_type=left)
    task = Task(text="{text}", kind=kind)
    model, objective = ModelSpec(folder, new_head=kind == "regression").load(task, 3)
    (batch,) = objective.training(task.examples(ROWS, ""), 3, seed=0)
    logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
    if kind == "regression":
        expected = ((logits[:, 0] - batch["labels"]) ** 2).mean()
    else:
        expected = -logits.log_softmax(-1)[torch.arange(3), batch["labels"]].mean()
    assert float(objective.loss(model, batch)) == pytest.approx(float(expected), rel=1e-5)


def test_a_head_of_another_task_is_kept_refused_or_replaced(tmp_path):
    folder = save(tmp_path, "bert", classes=3)
    two, kept = Task(text=""), hf.AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(WorkflowError, match=r"head of 3 outputs, and here it needs 2: --new-head"):
        ModelSpec(folder).load(two, 2)
    for outputs in (2, 3):
        heads = [ModelSpec(folder, seed=s, new_head=True).load(two, outputs)[0] for s in (0, 0, 1)]
        first, again, other = (h.classifier.weight for h in heads)
        assert first.shape[0] == outputs and torch.equal(first, again)
        assert not torch.equal(first, other) and heads[0].classifier.bias.eq(0).all()
        body = heads[0].bert.state_dict()
        assert all(torch.equal(v, kept.bert.state_dict()[k]) for k, v in body.items())
    same = ModelSpec(folder).load(two, 3)[0]
    assert torch.equal(same.classifier.weight, kept.classifier.weight)


def test_a_config_that_does_not_name_its_classes(tmp_path):
    folder = save(tmp_path, "bert", classes=3)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelSpec(folder).load(Task(text=""), None)[0].config.num_labels == 3


def test_classes_in_another_order_are_refused(tmp_path):
    names = {"0": "Good", "1": "Bad", "2": "So-so"}
    folder = save(tmp_path, "bert", id2label=names)
    with pytest.raises(WorkflowError, match=r"another order \(Good, Bad, So-so\)"):
        ModelSpec(folder).load(Task(text="", classes=("bad", "good", "so-so")))
    for new_head, classes in ((False, ("good", "bad", "so-so")), (True, ("bad", "good", "so-so"))):
        task = Task(text="", classes=classes)
        model, _ = ModelSpec(folder, new_head=new_head).load(task)
        assert model.config.id2label == dict(enumerate(classes))
        assert model.config.label2id == {n: i for i, n in enumerate(classes)}
    left, _ = ModelSpec(folder, new_head=True).load(Task(text=""), 3)
    assert left.config.id2label == {i: f"LABEL_{i}" for i in range(3)}


def spoil(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def pickled(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def foreign(folder):
    change(folder, "config.json", auto_map={"AutoConfig": "own.Config"}, model_type="own")
    (folder / "own.py").write_text("raise SystemExit('was run')")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def half(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "layer.1" not in k}
    save_file(tensors, path, {"format": "pt"})


SPOILS = {
    "config of nothing": (spoil("config.json", b""), "cannot be loaded"),
    "config of a list": (spoil("config.json", b"[]"), "cannot be loaded"),
    "config of brackets": (spoil("config.json", b"[" * 100_000), "cannot be loaded"),
    "config of bytes": (spoil("config.json", b"\xff\xfe\x00"), "cannot be loaded"),
    "config of numbers": (lambda f: change(f, "config.json", hidden_size=-3), "cannot be loaded"),
    "config of texts": (lambda f: change(f, "config.json", hidden_size="x"), "cannot be loaded"),
    "heads that do not fit": (
        lambda f: change(f, "config.json", num_attention_heads=5),
        "cannot be loaded",
    ),
    "layers without end": (
        lambda f: change(f, "config.json", num_hidden_layers=10**9),
        "asks for 1000000000 layers",
    ),
    "more layers": (lambda f: change(f, "config.json", num_hidden_layers=3), "its weights lack"),
    "unknown type": (lambda f: change(f, "config.json", model_type="x"), "cannot be loaded"),
    "no type": (lambda f: change(f, "config.json", model_type=None), "cannot be loaded"),
    "tokenizer of nothing": (spoil("tokenizer.json", b""), "cannot be loaded"),
    "tokenizer of brackets": (spoil("tokenizer.json", b"[" * 100_000), "cannot be loaded"),
    "tokenizer of another kind": (
        lambda f: change(f, "tokenizer.json", model={"type": "x"}),
        "cannot be loaded",
    ),
    "tokenizer config of a list": (spoil("tokenizer_config.json", b"[]"), "cannot be loaded"),
    "weights of nothing": (spoil("model.safetensors", b""), "cannot be loaded"),
    "weights of bytes": (spoil("model.safetensors", b"x" * 5000), "cannot be loaded"),
    "weights cut": (cut, "cannot be loaded"),
    "weights of half the layers": (half, "its weights lack"),
    "a pickle": (pickled, "are not read"),
    "code": (foreign, "code of its own"),
    "a kernel of the hub": (
        lambda f: change(f, "config.json", attn_implementation="some/kernel"),
        "code of its own",
    ),
    "an adapter": (spoil("adapter_config.json", b"{}"), "holds an adapter"),
}


@pytest.mark.parametrize("spoiled", SPOILS)
def test_a_damaged_folder_is_one_line_with_its_name(tmp_path, capsys, spoiled):
    change_it, message = SPOILS[spoiled]
    folder = tmp_path / "spoiled"
    save(folder, "bert")
    change_it(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    files = ["--train-file", str(rows), "--validation-file", str(rows), "--text-column", "text"]
    asked = ["--model", str(folder), *files, "--out", str(tmp_path / "out")]
    for verb in (["tune", "--terms", "value"], ["evaluate"]):
        assert main([*verb, *asked]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("beft-ext: ") and "spoiled" in error[-1], error
        assert message in error[-1], error
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_stumbles_over_a_batch_is_one_line(tmp_path):
    """T5 and BART classify at the end token, of which all texts must have as many."""
    for name in BOTH:
        folder = save(tmp_path / name, name)
        rows = [{"text": "a", "label": 0}, {"text": "b</s>", "label": 0}]
        task = Task(text="{text}")
        model, objective = ModelSpec(folder).load(task, 3)
        examples = task.examples(rows, "")
        with pytest.raises(DataError, match=r"cannot read this batch: .*same number of <eos>"):
            objective.predict(model, objective.held_out(examples, 2))
        (batch,) = objective.training(examples, 2, seed=0)
        with pytest.raises(DataError, match="cannot read this batch"):
            objective.loss(model, batch)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
def test_a_merged_folder_batches_and_knows_its_classes(tmp_path, name):
    folder = save(tmp_path / "base", name, pad_token_id=None, classes=3)
    special = {k: v for k, v in SPECIAL.items() if k != "pad_token"}
    letters(() if name == "gpt2" else ("<s>", "</s>"), **special).save_pretrained(folder)
    rows = [{"text": r["text"], "label": ("low", "high")[r["label"]]} for r in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.json").write_text('{"text": "{text}", "classes": ["low", "high"]}')
    file = str(tmp_path / "rows.jsonl")
    asked = ["--train-file", file, "--validation-file", file]
    asked += ["--task-config", str(tmp_path / "task.json")]
    run = [*asked, "--model", folder, "--epochs", "1", "--terms", "value", "--new-head"]
    assert main(["tune", *run, "--out", str(tmp_path / "t")]) == 0
    adapter = ["--adapter", str(tmp_path / "t" / "adapter")]
    merged = tmp_path / "merged"
    assert main(["merge", "--model", folder, *adapter, "--out", str(merged)]) == 0
    plain = hf.AutoModelForSequenceClassification.from_pretrained(merged).eval()
    assert plain.config.id2label == {0: "low", 1: "high"}
    assert plain.config.label2id == {"low": 0, "high": 1}
    tokenizer = hf.AutoTokenizer.from_pretrained(merged)
    assert tokenizer.pad_token_id == plain.config.pad_token_id
    texts = [r["text"] for r in ROWS]
    with torch.no_grad():
        together = plain(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = [plain(**tokenizer(t, return_tensors="pt")).logits[0] for t in texts]
    assert float((together - torch.stack(alone)).abs().max()) < 2e-5
    out = {}
    for model, more in ((str(merged), []), (folder, adapter)):
        to = ["--model", model, *more, "--out", str(tmp_path / "e")]
        assert main(["evaluate", *asked, *to]) == 0
        out[model] = json.loads((tmp_path / "e" / "evaluation.json").read_text())["predictions"]
    assert out[str(merged)] == out[folder] == together.argmax(-1).tolist()
    (tmp_path / "task.json").write_text('{"text": "{text}", "classes": ["high", "low"]}')
    for model, more in ((str(merged), []), (folder, adapter)):
        assert main(["evaluate", *asked, "--model", model, *more]) == 2


def test_a_pooler_that_the_folder_lacks_is_the_same_for_whoever_loads_it(tmp_path):
    """No adapter keeps it, and an answer goes through it."""
    folder = tmp_path / "masked"
    save(folder, "bert")
    hf.BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    found = [ModelSpec(str(folder), seed=seed).load(Task(text=""), 2)[0] for seed in (0, 7)]
    poolers = [model.bert.pooler.dense.weight for model in found]
    assert torch.equal(*poolers) and float(poolers[0].detach().std()) > 0
    assert not torch.equal(*(model.classifier.weight for model in found))


def test_code_of_the_tokenizer_is_not_run(tmp_path):
    folder = save(tmp_path, "bert")
    own = {"auto_map": {"AutoTokenizer": ["own.Tokens", None]}, "tokenizer_class": "Tokens"}
    change(folder, "tokenizer_config.json", **own)
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    require_alone(folder)


def test_the_skeleton_costs_no_memory(tmp_path):
    found = Folder.of(save(tmp_path, "bert"))
    assert {p.device.type for p in found.skeleton.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_select_and_tune_find_out_by_themselves(tmp_path, capsys, name):
    """Which term and which rate, also where a model has no bias."""
    folder = save(tmp_path / "base", name)
    rows = [
        {"text": "ab"[i % 2] * (2 + i % 7) + "c" * (i % 5), "label": ("low", "high")[i % 2]}
        for i in range(60)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    files = ["--train-file", str(file), "--text-column", "text", "--new-head"]
    assert main(["select", "--model", folder, *files, "--out", str(tmp_path / "s")]) == 0
    found = json.loads((tmp_path / "s" / "selection.json").read_text())["gains"]
    assert found["ranking"] and found["frontier"] and all(e > 0 for e in found["errors"].values())
    capsys.readouterr()
    run = ["--model", folder, *files, "--validation-split", "0.2", "--epochs", "1"]
    assert main(["tune", *run, "--out", str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    raced = json.loads((tmp_path / "t" / "audition.json").read_text())
    assert f"auto: '{raced['best']}'" in out and f"train at {raced['rate']:.2g}" in out
    config = json.loads((tmp_path / "t" / "adapter" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["beft_ext"]["terms"] == [raced["best"]]
