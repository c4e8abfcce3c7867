"""The install: without a compiler it succeeds and says what is missing; import costs nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **environment):
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    pytest.importorskip("pybind11", reason="pybind11 is needed to build without isolation")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "beft_ext"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    run(*pip, "--target", str(target), str(source), CC="false", CXX="false", BEFT_CUDA="0")
    return target


def test_without_a_compiler_the_install_succeeds_and_names_what_is_missing(without_compiler):
    assert not list((without_compiler / "beft_ext").glob("_native*.so"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from beft_ext.commands.cli import main; "
    code += "sys.exit(main(['doctor']))"
    said = run(sys.executable, "-S", "-c", code, str(without_compiler), PYTHONPATH=site())
    assert "cpu        not usable" in said and "compiler" in said and "reference  usable" in said


def test_without_a_compiler_the_operators_work(without_compiler):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, beft_ext.ops as o; "
        "assert o.__file__.startswith(sys.argv[1]); "
        "s = torch.zeros(3); g = o.bias_grad_stats(torch.ones(2, 4, 3), s, s.clone()); "
        "assert g.tolist() == [8.0] * 3 == s.tolist()"
    )
    run(sys.executable, "-S", "-c", code, str(without_compiler), PYTHONPATH=site())


def site():
    import torch

    return str(Path(torch.__file__).parent.parent)


def test_import_loads_nothing_heavy():
    code = "import sys, beft_ext; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"
