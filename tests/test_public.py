"""The public names: what lists them, the form of their docstrings, and that the examples run."""

import ast
import builtins
import dataclasses
import doctest
import inspect
import re

import pytest
from conftest import batch, tiny

import beft_ext
from beft_ext.errors import BeftError

SECTIONS = ("Args", "Attributes", "Shape", "Returns", "Raises", "Example", "Source")
HEADING = re.compile(rf"^({'|'.join(SECTIONS)}):", re.MULTILINE)
ENTRY = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)

PUBLIC = {name: getattr(beft_ext, name) for name in beft_ext.__all__}
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}
ERRORS = {name for name, kind in CLASSES.items() if issubclass(kind, BeftError)}
DATACLASSES = {
    name: [field.name for field in dataclasses.fields(kind)]
    for name, kind in CLASSES.items()
    if dataclasses.is_dataclass(kind)
}
FUNCTIONS = PUBLIC.keys() - CLASSES.keys()
METHODS = {
    f"{name}.{method}": thing
    for name, kind in CLASSES.items()
    for method, thing in vars(kind).items()
    if inspect.isfunction(thing) and not method.startswith("_")
}
DOCS = {name: inspect.getdoc(thing) or "" for name, thing in (PUBLIC | METHODS).items()}


def section(name, heading):
    """The text from a heading to the next one; empty where there is none."""
    parts = HEADING.split(DOCS[name])
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(heading, "")


def entries(name, heading):
    found = ENTRY.findall(section(name, heading))
    return [entry for line in found for entry in line.split(", ")]


def exceptions(kind=BeftError):
    return {kind.__name__}.union(*(exceptions(own) for own in kind.__subclasses__()))


def test_dir_lists_the_public_names():
    assert dir(beft_ext) == sorted([*beft_ext.__all__, "__version__"])


def test_type_checkers_are_told_the_same_names_of_the_same_homes():
    nodes = ast.walk(ast.parse(inspect.getsource(beft_ext)))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    told = {a.asname: n.module for n in imports for a in n.names if a.asname == a.name}
    assert told == {name: f"beft_ext.{home}" for name, home in beft_ext._HOMES.items()}


@pytest.mark.parametrize("name", DOCS)
def test_the_first_line_is_a_sentence_and_the_sections_are_in_order(name):
    first = DOCS[name].splitlines()[0]
    assert first.endswith(".") and len(first) <= 100
    order = [SECTIONS.index(heading) for heading in HEADING.findall(DOCS[name])]
    assert order == sorted(set(order))
    assert "DESIGN" not in DOCS[name]
    known = exceptions() | set(vars(builtins))
    assert set(entries(name, "Raises")) <= known


@pytest.mark.parametrize("name", sorted(DOCS.keys() - ERRORS - DATACLASSES.keys()))
def test_every_parameter_is_described(name):
    wanted = inspect.signature((PUBLIC | METHODS)[name]).parameters.keys() - {"self"}
    # A docstring of one sentence names its parameter there.
    sentence = wanted & set(re.findall(r"``(\w+)``", DOCS[name].splitlines()[0]))
    assert (set(entries(name, "Args")) or sentence) == wanted


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - ERRORS))
def test_every_field_and_property_is_described(name):
    properties = [n for n, thing in vars(CLASSES[name]).items() if isinstance(thing, property)]
    wanted, described = {*DATACLASSES.get(name, []), *properties}, {*entries(name, "Attributes")}
    assert described == wanted if name in DATACLASSES else described >= wanted


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_tells_what_it_returns_and_raises(name):
    returns = inspect.signature(PUBLIC[name]).return_annotation
    assert bool(section(name, "Returns")) == (returns != "None")
    assert entries(name, "Raises")


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - ERRORS))
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model": tiny("bert"), "loader": [batch(seed=seed) for seed in range(3)]}
    text, said = section(name, "Example"), []
    example = doctest.DocTestParser().get_doctest(text, given, name, None, None)
    doctest.DocTestRunner().run(example, out=said.append)
    assert example.examples and not said, "".join(said)
