"""The form of every public docstring, and its examples run."""

import dataclasses
import doctest
import inspect
import re

import pytest
import torch
from conftest import batch, tiny

import beft_ext
from beft_ext.errors import BeftError

SECTIONS = ("Args", "Attributes", "Shape", "Returns", "Raises", "Example", "Source")
PUBLIC = {name: getattr(beft_ext, name) for name in beft_ext.__all__}
ERRORS = {n for n, o in PUBLIC.items() if inspect.isclass(o) and issubclass(o, BeftError)}
HEADING = re.compile(rf"^({'|'.join(SECTIONS)}):", re.MULTILINE)


def text(name):
    return inspect.getdoc(PUBLIC[name]) or ""


def section(name, heading):
    """The lines below a heading, up to the next one."""
    found = re.split(HEADING, text(name))
    return dict(zip(found[1::2], found[2::2], strict=True)).get(heading, "")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_first_line_is_a_sentence_and_sections_stand_in_order(name):
    first = text(name).splitlines()[0]
    assert first.endswith(".") and len(first) <= 100
    order = [SECTIONS.index(h) for h in re.findall(HEADING, text(name))]
    assert order == sorted(set(order))
    assert not re.search(r"\bDESIGN\b", text(name))


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - ERRORS))
def test_every_argument_is_described(name):
    thing = PUBLIC[name]
    described = section(name, "Args") + section(name, "Attributes")
    if dataclasses.is_dataclass(thing):
        wanted = [f.name for f in dataclasses.fields(thing)]
    else:
        wanted = list(inspect.signature(thing).parameters)
    missing = [w for w in wanted if not re.search(rf"\b{w}\b.*?:", described, re.DOTALL)]
    assert not missing
    if inspect.isfunction(thing):
        assert section(name, "Raises")
        returns = inspect.signature(thing).return_annotation
        assert bool(section(name, "Returns")) == (returns not in ("None", None))


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - ERRORS))
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loader = [batch(seed=seed) for seed in range(4)]
    given = {"beft_ext": beft_ext, "torch": torch, "model": tiny("bert"), "loader": loader}
    assert ">>>" in section(name, "Example")
    example = doctest.DocTestParser().get_doctest(text(name), given, name, None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example)
    assert runner.failures == 0
