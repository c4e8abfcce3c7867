"""setup.py with compilers that only write down what they are asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = "sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_110 sm_120 sm_121"
COMPILER = """#!{python}
import pathlib, sys
with open("{log}", "a") as log:
    print("{name}", *sys.argv[1:], file=log)
if "--list-gpu-code" in sys.argv:
    print("{targets}")
if "{fails}" and "{fails}" in " ".join(sys.argv):
    sys.exit(1)
if "-o" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
"""


@pytest.fixture
def build(tmp_path):
    """Builds in a copy of the tree; gives what was said, and the compilers' calls by name."""
    pytest.importorskip("pybind11", reason="pybind11 is needed to build without isolation")
    tree, log = tmp_path / "tree", tmp_path / "calls"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    script = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert '"/usr/local/cuda"' in script  # this machine may have a toolkit there
    (tree / "setup.py").write_text(script.replace("/usr/local/cuda", "/nowhere"))
    (tree / "beft_ext").mkdir()
    shutil.copy(ROOT / "beft_ext" / "__init__.py", tree / "beft_ext")  # the version
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64" / "libcudart_static.a").touch()

    def run(fails="", without=(), targets=TARGETS, **environment):
        for name in ("nvcc", "c++"):
            path = toolkit / "bin" / name
            words = {"python": sys.executable, "log": log, "name": name}
            text = COMPILER.format(**words, fails=fails, targets=targets)
            path.write_text(text)
            path.chmod(0o755)
        for path in without:
            (toolkit / path).unlink()
        log.write_text("")
        here = {"PATH": f"{toolkit / 'bin'}:{os.environ['PATH']}", "CUDA_HOME": str(toolkit)}
        here |= {"CC": "c++", "CXX": "c++", "LDSHARED": "c++", "LDCXXSHARED": "c++"}
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "l", "--build-temp", "t"]
        done = subprocess.run(
            command,
            cwd=tree,
            env=os.environ | here | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        calls = {"nvcc": [], "c++": []}
        for line in log.read_text().splitlines():
            name, _, arguments = line.partition(" ")
            if "--list-gpu-code" not in arguments:
                calls[name].append(arguments)
        return done.stdout + done.stderr, calls, toolkit

    return run


CUDA = [f"csrc/cuda/{p.name}" for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


@pytest.mark.parametrize(
    ("known", "named"),
    [
        (TARGETS, ["75", "80", "86", "89", "90", "100", "120"]),
        ("sm_60 sm_75 sm_80 sm_86 sm_89 sm_90", ["75", "80", "86", "89", "90"]),
    ],
)
def test_with_nvcc_the_kernels_are_compiled_and_linked(build, known, named):
    """Machine code of every target that nvcc knows, and what any later GPU compiles for itself."""
    _, calls, toolkit = build(targets=known)
    assert [c.partition(" -c ")[2].split()[0] for c in calls["nvcc"]] == CUDA
    codes = [f"arch=compute_{t},code=sm_{t}" for t in named]
    codes.append(f"arch=compute_{named[-1]},code=compute_{named[-1]}")
    for call in calls["nvcc"]:
        assert [a[9:] for a in call.split() if a.startswith("-gencode=")] == codes
        assert "-fPIC" in call and f"--threads={os.cpu_count()}" in call
    *compiled, linked = calls["c++"]
    assert all("-DBEFT_WITH_CUDA=1" in c and f"-I{toolkit}/include" in c for c in compiled)
    for source in CUDA:
        assert f"t/{Path(source).stem}.cuda.o" in linked
    assert f"-L{toolkit}/lib64" in linked and "-lcudart_static" in linked


def test_sums_are_not_contracted_and_every_source_is_compiled(build):
    """A fused multiply-add would give other bits than the reference."""
    _, calls, _ = build(BEFT_CUDA="0")
    assert not calls["nvcc"]
    *compiled, linked = calls["c++"]
    sources = {"csrc/bindings.cpp", *(f"csrc/cpu/{p.name}" for p in ROOT.glob("csrc/cpu/*.cpp"))}
    assert {next(a for a in c.split() if a.endswith(".cpp")) for c in compiled} == sources
    for call in compiled:
        flags = call.split()
        assert {"-O3", "-std=c++17", "-ffp-contract=off", "-pthread"} <= set(flags)
        assert "-DBEFT_WITH_CUDA=1" not in flags and "-ffast-math" not in flags
    assert "cuda" not in linked


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fails": CUDA[-1]}, f"nvcc could not compile {CUDA[-1]}: building without CUDA kernels"),
        ({"without": ["lib64/libcudart_static.a"]}, "libcudart_static.a was not found"),
    ],
)
def test_without_a_whole_toolkit_the_cpu_part_is_built_alone(build, options, told):
    said, calls, _ = build(**options)
    assert told in said
    *compiled, linked = calls["c++"]
    assert compiled and "-DBEFT_WITH_CUDA=1" not in " ".join(compiled)
    assert "cuda" not in linked and "-ldl" in linked


def test_without_a_working_compiler_the_build_succeeds(build):
    said, calls, _ = build(fails="bindings.cpp", BEFT_CUDA="0")
    assert 'building extension "beft_ext._native" failed' in said
    assert not any("_native" in call.partition(" -o ")[2] for call in calls["c++"])
