"""Do the tests notice? One fault at a time goes into a copy of the tree, and the tests run.

Faults come from two places: a seeded sample of what cosmic-ray's operators make of a module, and
the ones that are planted by hand in ``faults.py``, which know C++, CUDA and Triton too. Each run
is a fork of this process, which has torch and transformers imported but not the package. So a
fault costs its tests and not the imports. A fault is noticed where a test fails, the package does
not import, the process dies, or it takes five times as long as without the fault. Of the tests of
the place those run that get to the faulted function, by coverage, the quickest first.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest
from faults import EQUIVALENT, FAULTS, MODELS, OPTIMIZER, Fault

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("beft_ext", "csrc", "tests", "docs", "benchmarks")
# Imported before the forks, as the tests do. Of torch not more than it imports itself: its compiler
# starts processes.
SHARED = ("numpy", "torch", "transformers", "peft", "safetensors", "tokenizers", "hypothesis",
          "accelerate", "scipy", "sklearn", "datasets", "matplotlib", "pyarrow")  # fmt: skip

# What a module's tests are, beside those of the room with its name.
MODULES: dict[str, tuple[str, ...]] = {
    "scores": ("test_scores.py", "selection"),
    "tap": ("test_tap.py", "test_layouts.py", "selection"),
    "layouts": ("test_tap.py", "test_layouts.py", "selection"),
    "training/loss": ("training/test_loss.py", "selection"),
    "training/observed": ("training/test_observed.py",),
    "training/optim": OPTIMIZER,
    "training/optim_state": OPTIMIZER,
    "training/flat": OPTIMIZER,
    "training/preparation": ("training/test_preparation.py", "training/test_optim.py"),
    "training/tuning": ("training/test_tuning.py",),
    "training/data": ("training/test_tuning.py",),
    "training/steps": ("training/test_steps.py",),
    "adapters": ("adapters",),
    "selection": ("selection", "test_scores.py"),
    "models": (*MODELS, "adapters/test_merging.py"),
    "ops": ("ops", "test_tap.py", "training/test_optim.py"),
    "files": ("test_files.py",),
}
# Beyond these the sample says nothing about the tests: help for the eye, kernels as data.
LEFT_OUT = ("__init__.py", "card.py", "hub.py", "registry.py")


@dataclass(frozen=True)
class Outcome:
    """One fault and what became of it: noticed, missed, equivalent, or gone (no such place)."""

    module: str
    file: str
    line: int
    old: str
    new: str
    verdict: str
    seconds: float


class Copy:
    """A copy of the tree in which one file at a time is replaced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        skip = shutil.ignore_patterns("__pycache__", "*.pyc", "results", ".hypothesis")
        for name in COPIED:
            shutil.copytree(ROOT / name, root / name, ignore=skip)
        for path in (p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"):
            shutil.copy2(path, root)
        self.log = root / "log.txt"
        self.native = {p: p.read_bytes() for p in (root / "beft_ext").glob("*.so")}

    def read(self, file: str) -> str:
        path = self.root / file
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @contextmanager
    def replaced(self, file: str, text: str) -> Iterator[None]:
        path, before = self.root / file, self.read(file)
        path.write_text(text, encoding="utf-8")
        built = file.startswith("csrc") and not file.startswith("csrc/cuda")
        try:
            if built:
                self._build()
            yield
        finally:
            path.write_text(before, encoding="utf-8")
            for native, content in self.native.items() if built else ():
                native.unlink(missing_ok=True)  # an open one must keep its bytes
                native.write_bytes(content)

    def _build(self) -> None:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        for native in self.native:
            native.unlink()
        with self.log.open("w") as log:
            subprocess.run(command, cwd=self.root, env=os.environ | {"BEFT_CUDA": "0"},
                           stdout=log, stderr=log, check=True)  # fmt: skip

    def passes(self, tests: list[str], limit: float, profile: Profile | None = None) -> bool:
        """Whether the tests pass within ``limit`` seconds. profile: listens to it."""
        child = os.fork()
        if child == 0:
            os._exit(self._test(tests, profile))
        end = time.monotonic() + limit
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status == 0
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False

    def _test(self, tests: list[str], profile: Profile | None) -> int:
        os.setsid()
        with self.log.open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(self.root)
        sys.path.insert(0, str(self.root))
        os.environ |= {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        options = ["-x", "-p", "no:cacheprovider", "-p", "no:randomly"]
        plugins = [] if profile is None else [profile]
        code = int(pytest.main([*options, *tests], plugins=plugins))
        if profile is not None:
            profile.write()
        sys.stdout.flush()
        return code


class Profile:
    """A pytest plugin: which lines each test runs, how long it takes, and what was imported."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "profile.json"
        self.seconds: dict[str, float] = {}
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[str(root / "beft_ext" / "*")]
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.coverage.start()
        self.coverage.switch_context(item.nodeid)
        start = time.monotonic()
        result = yield
        self.seconds[item.nodeid] = time.monotonic() - start
        self.coverage.stop()
        return result

    def write(self) -> None:
        data = self.coverage.get_data()
        lines = {
            str(Path(file).relative_to(self.root)): data.contexts_by_lineno(file)
            for file in data.measured_files()
        }
        found = {"seconds": self.seconds, "lines": lines, "modules": list(sys.modules)}
        self.path.write_text(json.dumps(found), encoding="utf-8")


def preload(names: list[str]) -> None:
    """Import what the tests import, but for the package and what starts processes."""
    for name in names:
        if name.split(".")[0] in SHARED and not name.startswith("torch."):
            try:
                importlib.import_module(name)
            except Exception:
                continue


def plain(source: str) -> str:
    """The code without what changes no number: annotations, docstrings, frozen dataclasses."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Name("_")
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if k.arg not in ("frozen", "repr", "strict")]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            types = [n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)]
            if types and types[0] in ("Callable", "Mapping", "Iterable"):
                node.value = ast.Name("_")
    return ast.dump(tree)


def sampled(root: Path, file: str, count: int, seed: int) -> list[tuple[int, str]]:
    """Line and faulted source of ``count`` places in the file, an operator of each by chance."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (root / file).read_text(encoding="utf-8")
    nodes = list(ast_nodes(get_ast(source)))
    places: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in operator_names():
        if get_operator(name).arguments():
            continue
        positions = (p for n in nodes for p in get_operator(name)().mutation_positions(n))
        for occurrence, (start, _) in enumerate(positions):
            places.setdefault(start, []).append((name, occurrence))
    chance = random.Random(f"{file} {seed}")
    order = sorted(places)
    chance.shuffle(order)
    found: list[tuple[int, str]] = []
    for place in order:
        if len(found) == count:
            break
        name, occurrence = chance.choice(places[place])
        mutated = mutate_code(source, get_operator(name)(), occurrence)
        try:
            if mutated is not None and plain(mutated) != plain(source):
                found.append((place[0], mutated))
        except SyntaxError:
            continue
    return found


def function_at(source: str, line: int) -> range:
    """Lines of the body of the innermost function around ``line``; none outside of functions."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    around = [n for n in nodes if n.body[0].lineno <= line <= (n.end_lineno or line)]
    inner = max(around, key=lambda n: n.lineno, default=None)
    return range(inner.body[0].lineno, (inner.end_lineno or 0) + 1) if inner else range(0)


def difference(before: str, after: str) -> tuple[str, str]:
    """The first line that differs, before and after."""
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    old, new = next(((a, b) for a, b in pairs if a != b), ("", ""))
    return old.strip(), new.strip()


def of_module(root: Path, module: str) -> list[str]:
    path = root / "beft_ext" / module
    files = [path.with_suffix(".py")] if path.with_suffix(".py").exists() else path.glob("*.py")
    kept = (f for f in files if f.name not in LEFT_OUT and "triton" not in f.name)
    return sorted(str(f.relative_to(root)) for f in kept)


def sample_of(root: Path, module: str, count: int, seed: int) -> list[tuple[str, int, str]]:
    """``count`` faults of a module, spread over its files by their length."""
    sizes = {f: (root / f).stat().st_size for f in of_module(root, module)}
    found = []
    for file, size in sizes.items():
        share = max(1, round(count * size / sum(sizes.values())))
        found += [(file, line, text) for line, text in sampled(root, file, share, seed)]
    return found


class Trial:
    """Runs faults one after another; each set of tests runs once without any before."""

    def __init__(self, copy: Copy, record: Path | None) -> None:
        self.copy, self.record = copy, record
        self.known: dict[tuple[str, ...], dict[str, Any]] = {}
        self.outcomes: list[Outcome] = []

    def profile(self, tests: tuple[str, ...]) -> dict[str, Any]:
        if tests not in self.known:
            paths = [str(self.copy.root / "tests" / t) for t in tests]
            profile = Profile(self.copy.root)
            if not self.copy.passes([p for p in paths if Path(p).exists()], 3600, profile):
                sys.exit(f"these tests fail without a fault: {tests}\n{self.copy.log.read_text()}")
            found = json.loads(profile.path.read_text(encoding="utf-8"))
            preload(found["modules"])
            print(f"{' '.join(tests)}: {sum(found['seconds'].values()):.0f} s", flush=True)
            self.known[tests] = found
        return self.known[tests]

    def those_of(self, tests: tuple[str, ...], file: str, line: int) -> tuple[list[str], float]:
        """The tests that run the function at ``line``, the quickest first, and how long they take;
        all of them where none does, as for constants, kernels and child processes."""
        profile = self.profile(tests)
        seconds: dict[str, float] = profile["seconds"]
        lines = profile["lines"].get(file, {})
        inside = function_at(self.copy.read(file), line) if lines else ()
        found = {test for n in inside for test in lines.get(str(n), ()) if test}
        chosen = sorted(found or seconds, key=lambda test: seconds[test])
        return chosen, sum(seconds[t] for t in chosen)

    def run(self, module: str, file: str, line: int, text: str, tests: tuple[str, ...]) -> None:
        old, new = difference(self.copy.read(file), text)
        if (file, old, new) in EQUIVALENT:
            self._note(Outcome(module, file, line, old, new, "equivalent", 0))
            return
        chosen, usual = self.those_of(tests, file, line)
        start = time.monotonic()
        with self.copy.replaced(file, text):
            missed = self.copy.passes(chosen, 60 + 5 * usual)
        took = round(time.monotonic() - start, 1)
        verdict = "missed" if missed else "noticed"
        self._note(Outcome(module, file, line, old, new, verdict, took))

    def plant(self, fault: Fault) -> None:
        before = self.copy.read(fault.file)
        if before.count(fault.old) != 1:
            gone = Outcome("planted", fault.file, 0, fault.old, fault.new, "gone", 0)
            self._note(gone)
            return
        line = before[: before.index(fault.old)].count("\n") + 1
        text = before.replace(fault.old, fault.new)
        self.run("planted", fault.file, line, text, fault.tests)

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if self.record is not None:
            with self.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        place = f"{outcome.file}:{outcome.line}"
        said = f"{outcome.verdict:<10} {outcome.seconds:6.1f} s  {place}"
        print(f"{said}  {outcome.old}  ->  {outcome.new}", flush=True)


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    modules = dict.fromkeys(o.module for o in outcomes)
    return {m: dict(Counter(o.verdict for o in outcomes if o.module == m)) for m in modules}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help=f"planted, or of {', '.join(MODULES)}")
    parser.add_argument("--count", type=int, default=40, help="sampled faults of a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", default="", help="planted faults in paths with this part alone")
    parser.add_argument("--record", type=Path, help="JSON lines that outcomes are added to")
    asked = parser.parse_args()
    modules = asked.modules or ["planted", *MODULES]
    if unknown := set(modules) - {"planted", *MODULES}:
        parser.error(f"unknown: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Copy(Path(folder) / "tree"), asked.record)
        for module in modules:
            if module == "planted":
                for fault in FAULTS:
                    if asked.files in fault.file:
                        trial.plant(fault)
                continue
            for file, line, text in sample_of(trial.copy.root, module, asked.count, asked.seed):
                trial.run(module, file, line, text, MODULES[module])
    for module, counts in summary(trial.outcomes).items():
        tried = counts.get("noticed", 0) + counts.get("missed", 0)
        share = counts.get("noticed", 0) / tried if tried else float("nan")
        print(f"{module}: {share:.0%} noticed of {tried} ({counts})")


if __name__ == "__main__":
    main()
