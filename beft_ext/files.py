"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial-"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; renamed to it on success, removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL, suffix=path.name)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a whole safetensors file. Raises OSError where the disk is full or read-only."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Clones: views of one buffer, as an optimizer's state are, safetensors refuses.
    own = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(own, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def sweep(folder: str | Path) -> None:
    """Remove what a killed process left half-written in ``folder``."""
    for leftover in Path(folder).glob(PARTIAL + "*"):
        leftover.unlink(missing_ok=True)


def require_writable(folder: str | Path) -> None:
    """Raise OSError now, not after hours of work, where ``folder`` cannot be written to."""
    probe = Path(folder) / ".writable"
    with whole_file(probe):
        pass
    probe.unlink()
