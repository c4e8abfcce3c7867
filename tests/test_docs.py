"""Every command and every piece of Python in README.md and docs/ runs, and every link leads on.

What needs several processes is marked ``py``: tests/distributed runs the same. Of verbs of make and
of scripts that take hours, what can be told at once is held: that they take what the pages give.
"""

import argparse
import json
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import batch, tiny
from torch.distributed.run import get_args_parser

import beft_ext
from beft_ext.commands import cli, demo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A line of a block, or words between backticks.
COMMAND = re.compile(r"(?:^|`)((?:make|torchrun|python|\.venv/bin/python) [^`\n]*)", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
WORDS = ("good", "fine", "bad", "poor", "slow", "odd")


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, *languages):
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(language, text) for language, text in found if language in languages]


def anchors(page):
    """Of the headings, as they are linked to."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


PYTHON = [(p, i) for p in PAGES for i, _ in enumerate(blocks(p, "python"))]
SHELL = [p for p in PAGES if any("beft-ext " in text for _, text in blocks(p, "sh"))]


def commands(first):
    """Each command of the pages that begins with this word, without its comment."""
    found = (c for page in PAGES for c in COMMAND.findall(page.read_text(encoding="utf-8")))
    words = (shlex.split(command, comments=True) for command in found)
    return sorted({shlex.join(own) for own in words if Path(own[0]).name == first})


@pytest.fixture
def desk(tmp_path, monkeypatch, tiny_folder, tiny_decoder):
    """A folder with what the pages name: MODEL, DECODER, DATA, and files of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("MODEL").symlink_to(tiny_folder)
    Path("DECODER").symlink_to(tiny_decoder)
    source = random.Random(0)
    for split, count in (("train", 200), ("validation", 16)):
        texts = [" ".join(source.choices(WORDS, k=4)) for _ in range(count)]
        Path("DATA/sst2").mkdir(parents=True, exist_ok=True)
        rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(texts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path(f"DATA/sst2/{split}.jsonl").write_text(lines, encoding="utf-8")
        own = [f"{text},{('complaint', 'praise')[i % 2]}" for i, text in enumerate(texts[:48])]
        Path(f"{split}.csv").write_text("\n".join(["text,label", *own, ""]), encoding="utf-8")
    Path("new.csv").write_text("text\ngood and fine\nbad\n", encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(path), f"{target} has no heading '{anchor}'"


def test_there_is_one_version():
    assert f"version: {beft_ext.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {beft_ext.__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", SHELL, ids=name_of)
def test_the_commands_run_as_they_are_written(page, desk, capsys):
    for language, text in blocks(page, "sh", "json"):
        if language == "json":
            Path("task.json").write_text(text, encoding="utf-8")
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["beft-ext"] and words[1] != "demo":
                code = cli.main(words[1:])
                assert code == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page, number", PYTHON, ids=lambda x: name_of(x) if x in PAGES else str(x))
def test_the_python_runs_as_it_is_written(page, number, desk, monkeypatch):
    every = demo.examples
    monkeypatch.setattr(demo, "examples", lambda split: every(split)[:48])
    loader = [batch(seed=seed) for seed in range(3)]
    rows = [{key: value[0] for key, value in one.items()} for one in loader]
    given = {"model": tiny("bert"), "loader": loader, "rows": rows, "__name__": "page"}
    _, text = blocks(page, "python")[number]
    exec(compile(text, name_of(page), "exec"), given)


@pytest.mark.parametrize("command", commands("make"))
def test_make_knows_its_verbs(command):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in commands("torchrun") if " -m " in c])
def test_what_torchrun_starts_is_a_command(command):
    words = shlex.split(command)
    options, asked = words[1 : words.index("-m")], words[words.index("-m") :]
    assert asked[:2] == ["-m", "beft_ext"] and cli._parser().parse_args(asked[2:])
    torchrun = get_args_parser()
    torchrun.parse_args([*options, *asked[:2]])


class Taken(Exception):
    """A script has read its arguments."""


@pytest.mark.parametrize("command", commands("python"))
def test_scripts_take_the_arguments_that_are_given(command, monkeypatch):
    script, *arguments = shlex.split(command)[1:]
    if script == "-m":
        return
    assert (ROOT / script).is_file()
    if not arguments:  # such a script writes a page, and other tests hold the page
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(*given):
        raise Taken(parse(*given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    for folder in (ROOT / "benchmarks", (ROOT / script).parent):
        monkeypatch.syspath_prepend(str(folder))
    known = set(sys.modules)
    try:
        with pytest.raises(Taken):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        for name in {p.stem for p in ROOT.glob("benchmarks/**/*.py")} - known:
            sys.modules.pop(name, None)


def test_there_are_commands_to_look_at():
    assert len(commands("make")) > 10 and len(commands("torchrun")) > 1
    assert len(commands("python")) > 5
