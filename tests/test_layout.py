"""The map in CONTRIBUTING.md: imports run one way, and in no circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "beft_ext"
# As in CONTRIBUTING.md: a room imports from rooms before it, and from itself.
ROOMS = ["errors", "files", "progress", "plots", "parallel", "models", "ops", "layouts", "slab"]
ROOMS += ["listener", "tap", "scores", "gains", "training", "selection", "adapters", "tasks"]
ROOMS += ["integrations", "commands", "__main__"]
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem != "__init__")


def module(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Modules of the package that a file imports, at its top or inside its functions."""
    known = {module(p) for p in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("beft_ext"):
            base = (node.module or "").removeprefix("beft_ext").lstrip(".")
            for name in (a.name for a in node.names):
                inner = f"{base}.{name}".lstrip(".")
                if inner in known:
                    yield inner
                elif base:
                    yield base
        if isinstance(node, ast.Import):
            names = (a.name for a in node.names if a.name.startswith("beft_ext."))
            yield from (n.removeprefix("beft_ext.") for n in names)


def test_every_room_is_on_the_map():
    rooms = {module(p).split(".")[0] for p in FILES}
    assert rooms == set(ROOMS)
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = [page.index(f"`{room}{'.py' if (PACKAGE / f'{room}.py').exists() else '/'}`")
              for room in ROOMS]  # fmt: skip
    assert places == sorted(places)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_import_runs_against_the_map(path):
    own = ROOMS.index(module(path).split(".")[0])
    against = [i for i in imports(path) if ROOMS.index(i.split(".")[0]) > own]
    assert not against


def test_no_circle():
    graph = {module(p): set(imports(p)) - {module(p)} for p in FILES}
    while free := [m for m, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph
