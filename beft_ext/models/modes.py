"""A model's evaluation mode and random state, and torch's way to compute, for a while."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from beft_ext.models.offload import devices_of


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no compiler, and the random state as it was."""
    modes = [(m, m.training) for m in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda_devices(model)))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Where wanted, torch's deterministic algorithms alone, and the workspace that cuBLAS needs to
    be deterministic; a RuntimeError of torch names an operation that has no such algorithm."""
    if not wanted:
        yield
        return
    name = "CUBLAS_WORKSPACE_CONFIG"
    before = torch.get_deterministic_debug_mode(), os.environ.get(name)
    os.environ.setdefault(name, ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        if before[1] is None:
            os.environ.pop(name, None)


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """The GPUs on which the model computes, whose random states its dropout draws on."""
    return [d for d in devices_of(model) if d.type == "cuda"]
