"""Which implementation of an operator is usable here, and which one runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from beft_ext.errors import BeftError

if TYPE_CHECKING:
    import torch

# Backend -> the type of device whose memory its kernels read; '' for any, by torch's own kernels.
DEVICES = {"reference": "", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


# Of the native module: its kernels get raw addresses, so an old build must not be called.
INTERFACE = 4


class BackendError(BeftError, RuntimeError):
    """A backend was asked for that cannot run here, or not on the tensors at hand."""


def _load_native() -> tuple[ModuleType | None, str]:
    try:
        from beft_ext import _native
    except ImportError as error:
        return None, f"the native module is missing ({error}): reinstall with a C++17 compiler"
    if getattr(_native, "interface", 1) != INTERFACE:
        return None, "the native module is of another version of this package: reinstall"
    return _native, ""


native, _why_no_native = _load_native()


# What torch says when it starts CUDA, and what to do about it.
NO_GPU = {
    "not compiled with CUDA": "torch was built without CUDA: install a CUDA build of torch",
    "driver on your system is too old": "the NVIDIA driver is too old for this torch: update the "
    "driver, or install a torch built for an older CUDA",
    "no NVIDIA driver": "there is no NVIDIA driver: install it",
    "No CUDA GPUs": "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES",
}


def _why_no_gpu() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip() or type(error).__name__
        return next((told for sign, told in NO_GPU.items() if sign in said), said.splitlines()[0])
    return "torch sees no CUDA GPU"


# What CUDA says of kernels that do not run on a GPU, and what to do about it.
NO_KERNEL = {
    "no kernel image": "the native module has no kernels for this GPU: reinstall from source with "
    "an nvcc that knows it",
    "driver version is insufficient": "the native module was built with a CUDA toolkit newer than "
    "the driver: update the driver, or reinstall from source with an older toolkit",
    "unsupported toolchain": "this GPU would have to compile the native module's kernels, but the "
    "driver is older than the toolkit that built them: update the driver",
}


def _why_not_built() -> str:
    if native is None or native.has_cuda:
        return _why_no_native
    return "the native module was built without nvcc: reinstall where the CUDA toolkit is"


def _why_not_cuda(index: int) -> str:
    import torch

    if native is None or not native.has_cuda:
        return _why_not_built()
    with torch.cuda.device(index):
        said = native.cuda_refusal()
    return next((told for sign, told in NO_KERNEL.items() if sign in said), said)


def _why_not_triton(index: int) -> str:
    import torch

    if not importlib.util.find_spec("triton"):
        return "triton is not installed: pip install triton"
    from beft_ext.ops.triton_bias_grad_stats import bias_grad_stats_triton

    try:  # the smallest call: triton alone knows which GPUs and compilers serve it
        dy, *buffers = torch.zeros(4, 1, dtype=torch.float32, device=torch.device("cuda", index))
        bias_grad_stats_triton(dy.view(1, 1, 1), None, 1, 1.0, *buffers)
        torch.cuda.synchronize(index)
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        return f"triton cannot run on this GPU ({said.splitlines()[0]}): try another triton"
    return ""


# GPU backends, the fastest first -> why one cannot run on the GPU of a number, or ''.
_PROBES: dict[str, Callable[[int], str]] = {"cuda": _why_not_cuda, "triton": _why_not_triton}
_answers: dict[tuple[str, int], str] = {}


def _refusal(name: str, index: int) -> str:
    """'' where a GPU backend runs on a GPU, else why not. Each GPU is asked once."""
    key = name, index
    if key not in _answers:
        _answers[key] = _PROBES[name](index)
    return _answers[key]


def backends() -> dict[str, str]:
    """Name of each backend -> '' where it is usable here, else the reason why it is not.

    Those of a GPU are tried on the current one.
    """
    import torch

    if torch.cuda.is_available():
        here = torch.cuda.current_device()
        triton, cuda = _refusal("triton", here), _refusal("cuda", here)
    else:
        triton = _why_no_gpu()
        cuda = _why_not_built() or triton
    return {"reference": "", "cpu": _why_no_native, "triton": triton, "cuda": cuda}


def require(name: str, source: str = "") -> None:
    """Raise BackendError, with the reason, unless backend ``name`` can run here."""
    usable = backends()
    if name not in usable:
        raise BackendError(f"unknown backend '{name}'{source}: choose one of {', '.join(DEVICES)}")
    if usable[name]:
        raise BackendError(f"backend '{name}'{source} cannot run here: {usable[name]}")


def set_backend(name: str | None) -> None:
    """Force one backend for every call (None: choose by device again).

    The environment variable ``BEFT_BACKEND`` does the same from the start.

    Raises:
        BackendError: for an unknown name, or a backend that cannot run here.
    """
    global _forced, _from_environment
    if name is not None:
        require(name)
    _forced, _from_environment = name, False


_forced = os.environ.get("BEFT_BACKEND") or None
_from_environment = _forced is not None  # and so not yet checked: that would import torch


def choose(device: torch.device) -> str:
    """The backend for tensors on ``device``: the forced one, else the fastest that runs there.

    Raises:
        BackendError: where the forced one does not exist, cannot run, or reads other memory.
    """
    global _from_environment
    if _forced is not None:
        if _from_environment:
            require(_forced, " (from the environment variable BEFT_BACKEND)")
            _from_environment = False
        if DEVICES[_forced] not in ("", device.type):
            raise BackendError(
                f"backend '{_forced}' takes tensors on {DEVICES[_forced]}, but these are on "
                f"{device.type}: move them, or call set_backend(None)"
            )
        if _forced in _PROBES and _refusal(_forced, device.index):
            raise BackendError(
                f"backend '{_forced}' cannot run on {device}: {_refusal(_forced, device.index)}"
            )
        return _forced
    if device.type == "cpu":
        return "cpu" if native is not None else "reference"
    if device.type == "cuda":
        for name in _PROBES:
            if not _refusal(name, device.index):
                return name
    return "reference"
