"""Files are whole or absent, carry a digest, and two writers leave each other's alone."""

import fcntl
import multiprocessing
import os
import random
import re
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file

from beft_ext.errors import BeftError
from beft_ext.files import (
    DIGEST,
    PARTIAL,
    UNSEALED,
    digest,
    locked,
    require_writable,
    save_json,
    save_tensors,
    sweep,
    whole_file,
    whole_files,
)


def flipped(data, place):
    """``data`` with one bit turned over."""
    return data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and names(path.parent) == ["file.txt"]


def test_a_writer_that_breaks_its_own_folder_still_says_why(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "x") as temporary:
        temporary.parent.rmdir()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_may_be_read_by_whom_the_umask_says(tmp_path, umask):
    """Whatever the library that wrote it thinks, as safetensors does of its owner."""
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "x") as temporary:
            temporary.touch(0o600)
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask


def test_of_several_files_the_last_goes_first_and_comes_last(tmp_path, monkeypatch):
    for name in ("a", "config", "z"):
        (tmp_path / name).write_text("old")
    moved, replace = [], type(tmp_path).replace

    def watching(path, target):
        moved.append((target.name, (tmp_path / "config").exists()))
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", watching)
    with whole_files(tmp_path, last="config") as temporary:
        for name in ("config", "z", "a"):
            (temporary / name).write_text("new")
    assert moved == [("a", False), ("z", False), ("config", False)]
    assert all((tmp_path / n).read_text() == "new" for n in ("a", "config", "z"))


def test_sweep_removes_what_nobody_writes_and_leaves_others(tmp_path):
    (tmp_path / f"{PARTIAL}x").write_text("left by a killed process")
    (tmp_path / f"{PARTIAL}y").mkdir()
    (tmp_path / f"{PARTIAL}y" / "big").write_text("left too")
    (tmp_path / "partial-z").write_text("not ours")
    with whole_file(tmp_path / "living") as temporary:
        temporary.write_text("1")
        sweep(tmp_path)
        assert temporary.exists()
        assert names(tmp_path) == [temporary.parent.name, "partial-z"]
    assert names(tmp_path) == ["living", "partial-z"]


def write_often(folder, mark):
    for i in range(30):
        with whole_files(folder, last="config") as temporary:
            (temporary / "weights").write_text(mark * 1000)
            (temporary / "config").write_text(mark)
        save_json(folder / f"{mark}.json", {"i": i})


def test_two_writers_in_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path, m)) for m in "ab"]
    for writer in writers:
        writer.start()
    while any(w.exitcode is None for w in writers):
        with locked(tmp_path):
            if (tmp_path / "config").exists():
                mark = (tmp_path / "config").read_text()
                assert (tmp_path / "weights").read_text() == mark * 1000
    assert [w.exitcode for w in writers] == [0, 0]
    assert names(tmp_path) == ["a.json", "b.json", "config", "weights"]


@pytest.mark.parametrize("when", ["opened", "locked"])
def test_a_folder_that_is_swept_before_it_is_locked_is_made_anew(tmp_path, monkeypatch, when):
    """Another process may take it for one that a killed process left."""
    real, struck = {"opened": os.open, "locked": fcntl.flock}[when], []

    def swept_first(*args, **options):
        if not struck:
            struck.extend(tmp_path.glob(f"{PARTIAL}*"))
            struck[0].rmdir()
        return real(*args, **options)

    module, name = (os, "open") if when == "opened" else (fcntl, "flock")
    with monkeypatch.context() as patched:
        patched.setattr(module, name, swept_first)
        with whole_file(tmp_path / "x") as temporary:
            temporary.write_text("whole")
    assert len(struck) == 1 and names(tmp_path) == ["x"]


def test_a_writable_folder_is_left_as_it_was(tmp_path):
    require_writable(tmp_path / "new")
    assert names(tmp_path / "new") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        require_writable(tmp_path / "file" / "sub")


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_no_flipped_bit_passes(tmp_path, kind):
    path = tmp_path / f"file.{kind}"
    if kind == "json":
        save_json(path, {"text": "\u00e4 1.0e5", DIGEST: UNSEALED})
    else:
        save_tensors(path, {"x": torch.arange(6.0), "y": torch.ones(2, 2).bool()}, {"k": "v"})
    data = path.read_bytes()
    carried = digest(path, BeftError)
    assert carried is not None and len(carried) == 64
    chance = random.Random(0)
    for place in chance.sample(range(8 * len(data)), 300):
        path.write_bytes(flipped(data, place))
        try:  # what hits the key or its colon leaves a file without a digest, which readers refuse
            assert digest(path, BeftError) is None
            assert not re.search(b'"sha256": ?"[0-9a-f]{64}"', path.read_bytes())
        except BeftError as error:
            assert "damaged" in str(error)


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_digest_is_looked_for_in_the_first_16_mib(tmp_path, beyond):
    """No header that we write is longer, and what lies behind it may look like one by chance."""
    seal = f'"{DIGEST}": "{UNSEALED}"'.encode()
    data = bytes(16 * 2**20 - len(seal) + beyond) + seal + b"more"
    path = tmp_path / "x"
    path.write_bytes(data.replace(UNSEALED.encode(), sha256(data).hexdigest().encode()))
    assert digest(path, BeftError) == (None if beyond else sha256(data).hexdigest())


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    found = set()
    for _ in range(8):
        save_tensors(
            tmp_path / "x",
            {"b": torch.ones(3), "\u00e4\u4e2d": torch.zeros(1)},
            {"one": "1", "2": "\u00fc"},
        )
        found.add((tmp_path / "x").read_bytes())
    assert len(found) == 1
    assert torch.equal(load_file(tmp_path / "x")["b"], torch.ones(3))


def test_views_of_one_buffer_are_saved_and_nan_is_no_json(tmp_path):
    buffer = torch.arange(8.0)
    save_tensors(tmp_path / "x", {"a": buffer[:4], "b": buffer[2:6], "c": buffer.view(4, 2).T})
    assert torch.equal(load_file(tmp_path / "x")["c"], buffer.view(4, 2).T)
    with pytest.raises(ValueError):
        save_json(tmp_path / "y.json", {"x": float("nan")})
    assert names(tmp_path) == ["x"]
