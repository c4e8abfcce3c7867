"""Files that are whole or absent, and that carry a digest of their bytes.

What is written lies in a temporary folder beside its place and is renamed when it is whole. The
writer holds a lock on that folder as long as it lives, so that others can tell what a killed
process left behind from what is still being written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beft_ext.errors import BeftError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial-"
DIGEST = "sha256"  # key of the digest, in JSON and in the metadata of safetensors
UNSEALED = "0" * 64  # stands where the digest will be, and in its place when it is computed
LARGEST_HEADER = 16 * 2**20
# An object of a JSON file. What a value is, its reader checks.
JsonObject = dict[str, Any]
_thread = threading.local()  # which folders this thread has locked
_SEAL = re.compile(rb'"%s": ?"([0-9a-f]{64})"' % DIGEST.encode())


@contextmanager
def whole_files(folder: str | Path, last: str | None = None) -> Iterator[Path]:
    """Write several files into ``folder`` as one.

    Args:
        last: name of the file without which the others are nothing. The old one is removed
            first and the new one comes last, so that a kill leaves the old files, the new ones,
            or files that nobody reads: never a mixture.
    Yields: an empty folder to write into. Its files are moved up on success; on failure they are
        removed, and ``folder`` holds what it held.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    temporary, handle = _temporary(folder)
    try:
        yield temporary
        found = (p for p in temporary.rglob("*") if p.is_file())
        files = sorted(found, key=lambda p: (p.name == last, p))
        for path in files:
            _to_disk(path)
        with locked(folder):
            if last is not None:
                (folder / last).unlink(missing_ok=True)
            for path in files:
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; its file becomes ``path`` on success and is removed on failure."""
    path = Path(path)
    with whole_files(path.parent) as temporary:
        yield temporary / path.name


def write_json(path: Path, record: object) -> None:
    """Write ``record`` as indented JSON, into a folder of ``whole_files``.

    A value ``UNSEALED`` under the key ``DIGEST`` becomes the digest of the file's bytes.
    Raises: ValueError for NaN.
    """
    text = json.dumps(record, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    _seal(path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file, into a folder of ``whole_files``; same content, same bytes.

    Returns: the digest of its bytes, which its metadata holds too.
    Raises: OSError where the disk is full or read-only.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Copies: views of one buffer, as an optimizer's state are, safetensors refuses.
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    try:
        save_file(own, path, {**(metadata or {}), DIGEST: UNSEALED})
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from error
    _sort_metadata(path)
    return _seal(path)


def save_json(path: str | Path, record: object) -> None:
    """``write_json``, as a whole file."""
    with whole_file(path) as temporary:
        write_json(temporary, record)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """``write_tensors``, as a whole file."""
    with whole_file(path) as temporary:
        return write_tensors(temporary, tensors, metadata)


def digest(path: Path, error: type[BeftError]) -> str | None:
    """The digest that a file carries, None for a file without one.

    Raises: ``error`` where the file's bytes are not those that the digest was made of.
    """
    try:
        found = _digest(path)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason}") from reason
    if found is None:
        return None
    _, carried, counted = found
    if carried != counted:
        raise error(f"{path} is damaged: its bytes do not give the digest that it carries")
    return carried


def sweep(folder: str | Path) -> None:
    """Remove what killed processes left half-written in ``folder``, and nothing of living ones."""
    for leftover in Path(folder).glob(PARTIAL + "*"):
        with suppress(OSError):  # another process may be sweeping too
            handle = os.open(leftover, os.O_RDONLY)
            try:
                if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(handle)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes and threads from moving files into ``folder`` for a short while.

    Whoever holds the lock may write there as ever, and may ask for it again.
    """
    handle = os.open(folder, os.O_RDONLY)
    held, status = vars(_thread).setdefault("held", set()), os.fstat(handle)
    key = (status.st_dev, status.st_ino)
    # Nobody else moves files into a temporary folder, whose lock its writer holds already.
    own = key in held or Path(folder).name.startswith(PARTIAL)
    try:
        if not own:
            _lock(handle, fcntl.LOCK_EX)
            held.add(key)
        yield
    finally:
        if not own:
            held.discard(key)
        os.close(handle)


def require_writable(folder: str | Path) -> None:
    """Raise OSError now, not after hours of work, where ``folder`` cannot be written to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary, handle = _temporary(folder)
    os.close(handle)
    temporary.rmdir()


def _temporary(folder: Path) -> tuple[Path, int]:
    """An empty folder inside ``folder`` and the handle that holds its lock."""
    while True:  # another process may sweep it away between its making and its locking
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=PARTIAL))
        with suppress(FileNotFoundError):
            handle = os.open(temporary, os.O_RDONLY)
            _lock(handle, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, handle
            os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """False where another process holds the lock, or the file system knows none."""
    try:
        fcntl.flock(handle, how)
    except OSError:
        return False
    return True


def _to_disk(path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # some libraries make files that only their owner can read
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _seal(path: Path) -> str:
    """Put the digest into its place. Returns it; '' where there is no such place."""
    found = _digest(path)
    if found is None:
        return ""
    place, _, counted = found
    with path.open("r+b") as file:
        file.seek(place)
        file.write(counted.encode())
    return counted


def _digest(path: Path) -> tuple[int, str, str] | None:
    """Where in the file the digest stands, the one that stands there, and that of its bytes."""
    with path.open("rb") as file:
        head = file.read(LARGEST_HEADER)
        found = _SEAL.search(head)
        if found is None:
            return None
        start, end = found.span(1)
        counted = hashlib.sha256(head[:start] + UNSEALED.encode() + head[end:])
        while part := file.read(LARGEST_HEADER):
            counted.update(part)
    return start, found[1].decode(), counted.hexdigest()


def _sort_metadata(path: Path) -> None:
    """Give the metadata of a safetensors file, whose order is left to chance, a fixed one."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = header["__metadata__"]
        header["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
