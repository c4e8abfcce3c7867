"""Which backend runs: by device, or the forced one, which meets tensors of its own device only."""

import subprocess
import sys

import pytest
import torch

from beft_ext.ops import BackendError, bias_grad_stats, dispatch, set_backend


@pytest.fixture(autouse=True)
def _any_backend_again():
    yield
    set_backend(None)


@pytest.fixture
def every_backend_usable(monkeypatch):
    """As on a machine with a GPU; a launch ends the test."""
    monkeypatch.setattr(dispatch, "backends", lambda: dict.fromkeys(dispatch.DEVICES, ""))


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_backend_refuses_memory_of_the_host(every_backend_usable, name, dtype):
    set_backend(name)
    call = torch.zeros(1, 2, 3, dtype=dtype), torch.zeros(3, dtype=dtype), torch.zeros(3)
    call = *call[:2], call[2].to(dtype)
    with pytest.raises(BackendError, match=f"'{name}' takes tensors on cuda.*on cpu"):
        bias_grad_stats(*call)
    with pytest.raises(BackendError, match=name):
        torch.ops.beft_ext.bias_grad_stats(call[0], None, 1.0, *call[1:])


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu", "meta"])
def test_the_cpu_backend_refuses_memory_of_a_device(every_backend_usable, device):
    set_backend("cpu")
    with pytest.raises(BackendError, match=f"takes tensors on cpu.*on {device}"):
        dispatch.choose(device)


def test_the_reference_takes_any_device():
    set_backend("reference")
    assert [dispatch.choose(d) for d in ("cpu", "cuda", "mps")] == ["reference"] * 3


@pytest.mark.parametrize(
    ("native", "cuda", "triton", "chosen"),
    [
        (True, True, True, {"cpu": "cpu", "cuda": "cuda", "mps": "reference"}),
        (True, False, True, {"cpu": "cpu", "cuda": "triton", "mps": "reference"}),
        (True, False, False, {"cpu": "cpu", "cuda": "reference"}),
        (False, False, True, {"cpu": "reference", "cuda": "triton"}),
        (False, False, False, {"cpu": "reference", "cuda": "reference"}),
    ],
)
def test_the_fastest_usable_backend_is_chosen(monkeypatch, native, cuda, triton, chosen):
    class Native:
        has_cuda = cuda

    monkeypatch.setattr(dispatch, "native", Native if native else None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: triton or None)
    assert {device: dispatch.choose(device) for device in chosen} == chosen


@pytest.mark.parametrize("gpu", [False, True])
def test_what_cannot_run_says_why(monkeypatch, gpu):
    class Native:
        has_cuda = False

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(dispatch, "native", Native)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    reasons = dispatch.backends()
    assert reasons["reference"] == ""
    assert ("triton is not installed" if gpu else "CUDA") in reasons["triton"]
    assert "without nvcc" in reasons["cuda"]
    for name in ("triton", "cuda"):
        with pytest.raises(BackendError, match=f"'{name}' cannot run here: "):
            set_backend(name)
    monkeypatch.setattr(dispatch, "native", None)
    monkeypatch.setattr(dispatch, "_why_no_native", "no native module")
    assert dispatch.backends()["cpu"] == dispatch.backends()["cuda"] == "no native module"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Torch not compiled with CUDA enabled", "torch was built without CUDA: install a CUDA"),
        ("The NVIDIA driver on your system is too old (11)", "the NVIDIA driver is too old for"),
        ("Found no NVIDIA driver on your system.", "there is no NVIDIA driver: install it"),
        ("No CUDA GPUs are available", "no GPU is visible: check nvidia-smi"),
        ("out of luck\nmore", "out of luck"),
        ("", "RuntimeError"),
        (None, "torch sees no CUDA GPU"),
    ],
)
def test_what_torch_says_of_a_gpu_is_told_with_a_remedy(monkeypatch, said, told):
    def init():
        if said is not None:
            raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = dispatch.backends()["triton"]
    assert reason.startswith(told) and "\n" not in reason


def test_without_the_native_module_the_reference_runs_and_says_why():
    code = """if True:
        import sys
        sys.modules["beft_ext._native"] = None
        from beft_ext.ops import backends, dispatch
        print(dispatch.choose("cpu"), backends()["cpu"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("reference the native module is missing ("), done.stderr
    assert done.stdout.endswith("): reinstall with a C++17 compiler\n")


def test_an_old_build_of_the_native_module_is_not_called():
    code = """if True:
        import sys, types
        sys.modules["beft_ext._native"] = types.ModuleType("beft_ext._native")
        from beft_ext.ops import backends, dispatch
        print(dispatch.choose("cpu"), backends()["cpu"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("reference the native module is of another version"), done.stderr


def test_an_unknown_backend_is_named_and_changes_nothing():
    set_backend("reference")
    with pytest.raises(BackendError, match=r"unknown backend 'gpu': choose one of reference, cpu"):
        set_backend("gpu")
    assert dispatch.choose("cpu") == "reference"


CALL = """
import torch
from beft_ext.ops import bias_grad_stats, dispatch, set_backend
def call():
    try:
        bias_grad_stats(torch.zeros(1, 2, 3), torch.zeros(3), torch.zeros(3))
        print(dispatch.choose("cpu"))
    except Exception as error:
        print(type(error).__name__, error)
call()
call()
set_backend(None)
call()
"""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("reference", ["reference"] * 2),
        ("", [dispatch.choose("cpu")] * 2),
        (
            "gpu",
            ["BackendError unknown backend 'gpu' (from the environment variable BEFT_BACK"] * 2,
        ),
        pytest.param(
            "cuda",
            ["BackendError backend 'cuda' (from the environment variable BEFT_BACKEND) cannot"] * 2,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can run here"),
        ),
    ],
)
def test_the_environment_forces_a_backend_until_it_is_taken_back(monkeypatch, value, said):
    monkeypatch.setenv("BEFT_BACKEND", value)
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line, expected in zip(lines, [*said, dispatch.choose("cpu")], strict=True):
        assert line.startswith(expected)
