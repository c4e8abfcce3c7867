"""The examples run as they are, on tiny models, and end with what they promise to show."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# A script, and what its last lines look like.
SHOWN = {
    "own_csv": r"accuracy [\d.]+\n.*\n(delivery|praise|refund) +\w.*\n$",
    "decoder_prompts": r"accuracy: \[[\d., ]+\]\nmerged: (delivery|praise|refund): \w.*\n$",
    "trainer": r"checkpoint-24/adapter\n.*\nYou charged me twice: (delivery|praise|refund)\n$",
    "sentence_embeddings": r"validation loss: \[[\d., ]+\]\nsame topic .*, another -?[\d.]+\n$",
    "tokens": r"f1: \[[\d., ]+\]\nnumbers:.*\n$",
}
NEEDS = {"trainer": "accelerate", "sentence_embeddings": "sentence_transformers"}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a script in this process, into ``tmp_path``; what it prints."""

    def ran(name, *arguments):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.delitem(sys.modules, "small_models", raising=False)
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path), *arguments])
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return ran


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_runs_and_ends_as_it_says(name, run, tiny_folder, tmp_path):
    needed = NEEDS.get(name, "torch")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    model = [] if name == "decoder_prompts" else ["--model", tiny_folder]
    out = run(name, *model)
    assert re.search(SHOWN[name], out, re.DOTALL), out[-500:]
    assert list(tmp_path.rglob("adapter_config.json"))


def test_what_is_not_installed_is_a_sentence(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SystemExit, match=r"needs sentence-transformers: pip install 'beft-ext"):
        run("sentence_embeddings")


def test_without_the_demos_model_the_encoder_is_a_tiny_one(monkeypatch):
    from beft_ext.commands import demo

    def missing():
        raise demo.DemoError("not installed")

    monkeypatch.setattr(demo, "minilm", missing)
    made = runpy.run_path(str(EXAMPLES / "small_models.py"))
    import transformers

    folder = made["encoder"]()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("My parcel 4711")["input_ids"]) == "My parcel 4711"
    model = transformers.AutoModel.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) < 200_000


def test_the_index_names_each_and_each_is_short():
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {p.stem for p in EXAMPLES.glob("*.py")} - {"small_models"}
    assert scripts == SHOWN.keys()
    for name in scripts:
        assert f"[{name}.py]({name}.py)" in index
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert f"python examples/{name}.py" in text and len(text.splitlines()) < 110
