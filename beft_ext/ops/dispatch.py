"""Which implementation of an operator is usable here, and which one runs."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

from beft_ext.errors import BeftError

# Backend -> the type of device whose memory its kernels read; '' for any, by torch's own kernels.
DEVICES = {"reference": "", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


# Of the native module: its kernels get raw addresses, so an old build must not be called.
INTERFACE = 2


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


def backends() -> dict[str, str]:
    """Name of each backend -> '' where it is usable here, else the reason why it is not."""
    import torch

    gpu = "" if torch.cuda.is_available() else _why_no_gpu()
    triton = gpu or (
        "" if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
    )
    no_cuda = "the native module was built without nvcc: reinstall where the CUDA toolkit is"
    cuda = _why_no_native or ("" if native and native.has_cuda else no_cuda) or gpu
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


def choose(device_type: str) -> str:
    """The backend for tensors on ``device_type``: the forced one, else the fastest usable.

    Raises:
        BackendError: where the forced one does not exist, cannot run, or reads other memory.
    """
    global _from_environment
    if _forced is not None:
        if _from_environment:
            require(_forced, " (from the environment variable BEFT_BACKEND)")
            _from_environment = False
        if DEVICES[_forced] not in ("", device_type):
            raise BackendError(
                f"backend '{_forced}' takes tensors on {DEVICES[_forced]}, but these are on "
                f"{device_type}: move them, or call set_backend(None)"
            )
        return _forced
    if device_type == "cpu":
        return "cpu" if native is not None else "reference"
    if device_type == "cuda":
        if native is not None and native.has_cuda:
            return "cuda"
        if importlib.util.find_spec("triton"):
            return "triton"
    return "reference"
