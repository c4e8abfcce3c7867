"""Which backend runs: by device, or the forced one, which meets tensors of its own device only."""

import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

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


def on(*kinds):
    return [torch.device(kind, 0) for kind in kinds]


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU: what CUDA and Triton say of it is set by the test; '' for yes, None for missing.
    Counts the questions."""

    def set_up(cuda="", triton="", native=True):
        asked = {"cuda": 0, "triton": 0}

        def ask(name, said):
            asked[name] += 1
            return said

        fake = SimpleNamespace(has_cuda=cuda is not None, cuda_refusal=lambda: ask("cuda", cuda))
        monkeypatch.setattr(dispatch, "native", fake if native else None)
        monkeypatch.setattr(dispatch, "_why_no_native", "" if native else "no native module")
        monkeypatch.setattr(dispatch, "_answers", {})
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        if triton is None:
            monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
        else:
            answer = {"triton": lambda index: ask("triton", triton)}
            monkeypatch.setattr(dispatch, "_PROBES", dispatch._PROBES | answer)
        return asked

    return set_up


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
        dispatch.choose(torch.device(device))


def test_the_reference_takes_any_device():
    set_backend("reference")
    assert [dispatch.choose(d) for d in on("cpu", "cuda", "mps")] == ["reference"] * 3


@pytest.mark.parametrize(
    ("native", "cuda", "triton", "chosen"),
    [
        (True, "", "", {"cpu": "cpu", "cuda": "cuda", "mps": "reference"}),
        (True, None, "", {"cpu": "cpu", "cuda": "triton", "mps": "reference"}),
        (True, None, None, {"cpu": "cpu", "cuda": "reference"}),
        (True, "no kernel image", "", {"cpu": "cpu", "cuda": "triton"}),
        (True, "no kernel image", "too old", {"cpu": "cpu", "cuda": "reference"}),
        (False, "", "", {"cpu": "reference", "cuda": "triton"}),
        (False, "", None, {"cpu": "reference", "cuda": "reference"}),
    ],
)
def test_the_fastest_backend_that_runs_on_the_device_is_chosen(gpu, native, cuda, triton, chosen):
    gpu(cuda, triton, native)
    assert {device: dispatch.choose(torch.device(device, 0)) for device in chosen} == chosen


def test_each_gpu_is_asked_once(gpu):
    asked = gpu("no kernel image")
    for _ in range(3):
        assert [dispatch.choose(torch.device("cuda", i)) for i in (0, 1)] == ["triton"] * 2
    dispatch.backends()
    assert asked == {"cuda": 2, "triton": 2}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no kernel image is available for execution on the device", "an nvcc that knows it"),
        ("CUDA driver version is insufficient for CUDA runtime version", "update the driver, or"),
        ("the provided PTX was compiled with an unsupported toolchain.", "update the driver"),
        ("out of luck", "out of luck"),
    ],
)
def test_kernels_that_do_not_run_on_a_gpu_are_told_with_a_remedy(gpu, said, told):
    gpu(said)
    assert told in dispatch.backends()["cuda"] and dispatch.backends()["triton"] == ""
    with pytest.raises(BackendError, match=f"'cuda' cannot run here: .*{told}"):
        set_backend("cuda")
    assert dispatch.choose(*on("cuda")) == "triton"


def test_a_forced_backend_is_refused_on_a_gpu_that_does_not_run_it(gpu):
    gpu()
    set_backend("cuda")
    assert dispatch.choose(*on("cuda")) == "cuda"
    dispatch._answers["cuda", 1] = "no kernels"
    with pytest.raises(BackendError, match="'cuda' cannot run on cuda:1: no kernels"):
        dispatch.choose(torch.device("cuda", 1))


@pytest.mark.parametrize("wrong", ["PTX 9 is unsupported\nmore", "", None])
def test_triton_is_tried_by_its_smallest_call(monkeypatch, wrong):
    def kernels(dy, offsets, chunks, scale, *buffers):
        assert dy.shape == (1, 1, 1) and len(buffers) == 3
        if wrong is not None:
            raise ValueError(wrong)

    zeros = torch.zeros
    fake = SimpleNamespace(bias_grad_stats_triton=kernels)
    monkeypatch.setitem(sys.modules, "beft_ext.ops.triton_bias_grad_stats", fake)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    said = "" if wrong is None else wrong.partition("\n")[0] or "ValueError"
    told = f"triton cannot run on this GPU ({said}): try another triton" if said else ""
    assert dispatch._why_not_triton(0) == told


@pytest.mark.parametrize("there", [False, True])
def test_what_cannot_run_says_why(monkeypatch, gpu, there):
    gpu(cuda=None, triton=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    reasons = dispatch.backends()
    assert reasons["reference"] == ""
    assert ("triton is not installed" if there else "CUDA") in reasons["triton"]
    assert "without nvcc" in reasons["cuda"]
    for name in ("triton", "cuda"):
        with pytest.raises(BackendError, match=f"'{name}' cannot run here: "):
            set_backend(name)
    gpu(native=False)
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
        import torch
        from beft_ext.ops import backends, dispatch
        print(dispatch.choose(torch.device("cpu")), backends()["cpu"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("reference the native module is missing ("), done.stderr
    assert done.stdout.endswith("): reinstall with a C++17 compiler\n")


def test_an_old_build_of_the_native_module_is_not_called():
    code = """if True:
        import sys, types
        sys.modules["beft_ext._native"] = types.ModuleType("beft_ext._native")
        import torch
        from beft_ext.ops import backends, dispatch
        print(dispatch.choose(torch.device("cpu")), backends()["cpu"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("reference the native module is of another version"), done.stderr


def test_an_unknown_backend_is_named_and_changes_nothing():
    set_backend("reference")
    with pytest.raises(BackendError, match=r"unknown backend 'gpu': choose one of reference, cpu"):
        set_backend("gpu")
    assert dispatch.choose(torch.device("cpu")) == "reference"


CALL = """
import torch
from beft_ext.ops import bias_grad_stats, dispatch, set_backend
def call():
    try:
        bias_grad_stats(torch.zeros(1, 2, 3), torch.zeros(3), torch.zeros(3))
        print(dispatch.choose(torch.device("cpu")))
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
        ("", [dispatch.choose(torch.device("cpu"))] * 2),
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
    for line, expected in zip(lines, [*said, dispatch.choose(torch.device("cpu"))], strict=True):
        assert line.startswith(expected)
