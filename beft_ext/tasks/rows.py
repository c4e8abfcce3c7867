"""Rows of labelled data: local files of five kinds, compressed or not, or a data set of the hub.

The same rows mean the same in every kind. A csv or tsv file knows texts alone: nothing in it is
taken for a number or for a missing value. ``cells.py`` says what a value means.
``Rows`` are read anew at each pass where there are too many to be held.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property, partial
from io import BufferedReader
from itertools import chain, compress
from pathlib import Path
from typing import Any, BinaryIO

from beft_ext.tasks.cells import DataError, Row, decoded, distinct, parse_json, reason
from beft_ext.tasks.separated import needed, separated, values

Open = Callable[[Path], Any]  # gives a binary file, unpacked
Columns = Collection[str] | None  # names that are needed, None for all; others may be left out
PIECE = 2**20  # bytes that are read at a time
HELD, HELD_TEXT = 2**17, 2**27  # rows, and characters in them, that are held in memory


class Rows:
    """The rows of a file or a data set, each with its number, which counts from 1.

    Up to ``HELD`` rows with ``HELD_TEXT`` characters are read once and held in memory. More are
    read anew by every pass.

    Args:
        where: what messages call them.
        read: gives all rows, at each call from the first.
        digest: of what is read.
    """

    def __init__(
        self, where: str, read: Callable[[Columns], Iterator[Row]], digest: Callable[[], str]
    ) -> None:
        self.where, self._read, self._digest = where, read, digest
        self._count: int | None = None

    @classmethod
    def of(cls, path: Path) -> Rows:
        """Of a file. It is not read yet."""
        return cls(str(path), lambda columns: iterate_rows(path, columns), partial(_sha256, path))

    def digest(self) -> str:
        """Of the bytes that are read."""
        return self._digest()

    @cached_property
    def held(self) -> list[Row] | None:
        """The rows, where they are few."""
        found, text = list[Row](), 0
        for row in self._read(None):
            found.append(row)
            text += sum(len(v) for v in row.values() if isinstance(v, str))
            if len(found) > HELD or text > HELD_TEXT:
                return None
        return found

    def numbered(self, columns: Columns = None) -> Iterator[tuple[int, Row]]:
        """Each row with its number. Raises DataError for a file that cannot be read."""
        number = 0
        for number, row in enumerate(self.held or self._read(columns), 1):
            yield number, row
        self._count = number

    def __len__(self) -> int:
        """How many there are; to know it takes one pass."""
        if self._count is None:
            for _ in self.numbered(()):
                pass
        assert self._count is not None
        return self._count

    def part(self, places: Iterable[int], where: str | None = None, others: bool = False) -> Rows:
        """The rows at some places, from 0, in their order; the other rows where ``others``."""
        mask = bytearray([others]) * len(self)
        for place in places:
            mask[place] = not others
        return _Part(self, mask, where or self.where)


class _Part(Rows):
    """mask: 1 for each row that is one of the part's."""

    def __init__(self, whole: Rows, mask: bytearray, where: str) -> None:
        self.whole, self.mask, self.where = whole, mask, where

    @cached_property
    def held(self) -> list[Row] | None:
        if self.whole.held is None:
            return None
        return list(compress(self.whole.held, self.mask))

    def digest(self) -> str:
        return hashlib.sha256(self.whole.digest().encode() + self.mask).hexdigest()

    def numbered(self, columns: Columns = None) -> Iterator[tuple[int, Row]]:
        return compress(self.whole.numbered(columns), self.mask)

    def __len__(self) -> int:
        return sum(self.mask)


def read_rows(path: Path | str) -> list[Row]:
    """The rows of a file.

    Args:
        path: a csv, tsv, json, jsonl or parquet file, which may be compressed: ``x.csv.gz``.
    Returns: one dict per row, with the file's columns as keys. Rows count from 1 in messages;
        blank lines and the header do not count.
    Raises:
        DataError: one line with the file's name, and the row's number where there is one.
    """
    return list(iterate_rows(path))


def iterate_rows(path: Path | str, columns: Columns = None) -> Iterator[Row]:
    """``read_rows`` one row after another, without the whole file in memory; a ``.json`` list and
    a compressed parquet file are read whole. columns: that are needed; others may be left out."""
    path = Path(path)
    kind, unpack = _kind(path)
    reader = _READERS.get(kind)
    if reader is None:
        raise DataError(
            f"{path}: unknown kind of file; use {', '.join(_READERS)}, alone or before "
            f"{', '.join(_UNPACKERS)}"
        )
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    row = None
    try:
        for row in reader(partial(unpack or _plain, path), columns):
            yield row
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: {kind} needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # readers of damaged files raise many unrelated types
        raise DataError(f"{path}: cannot be read as {kind[1:]}: {reason(error)}") from error
    if row is None:
        raise DataError(f"{path}: there are no rows")


def find_file(folder: Path, name: str) -> Path:
    """The file in a folder that is called ``name`` but for its kind; ``name.jsonl`` if there is
    none. Raises DataError if there are two."""
    known = [folder / f"{name}{kind}{packed}" for kind in _READERS for packed in ("", *_UNPACKERS)]
    found = [path for path in known if path.is_file()]
    if len(found) > 1:
        raise DataError(f"{found[0]}: {found[1].name} is beside it: keep one of the two")
    return found[0] if found else folder / f"{name}.jsonl"


def hub_rows(path: str, name: str | None, split: str, where: str) -> Rows:
    """The rows of one split of a hub's data set; a class is given by its name.

    Raises:
        DataError: if ``datasets`` is not installed, or the hub cannot be reached.
    """
    wanted = path if name is None else f"{path}, {name}"

    def refused(error: Exception) -> DataError:
        return DataError(
            f"the hub's '{wanted}' could not be read ({reason(error)}): give --data DIR"
        )

    try:
        import datasets
    except ImportError as error:
        message = "reading the hub needs datasets: pip install 'beft-ext[data]', or give --data DIR"
        raise DataError(message) from error
    try:
        found = datasets.load_dataset(path, name, split=split, trust_remote_code=False)
    except Exception as error:  # the hub's client raises many unrelated types
        raise refused(error) from error
    features = getattr(found, "features", None) or {}
    named = {c: f.names for c, f in features.items() if hasattr(f, "names")}

    def read(columns: Columns) -> Iterator[Row]:
        rows = iter(found)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                raise refused(error) from error
            if row is None:
                return
            yield row | {c: _class_name(row[c], names) for c, names in named.items()}

    return Rows(where, read, lambda: str(getattr(found, "_fingerprint", wanted)))


def _class_name(number: int | None, names: list[str]) -> str | None:
    """-1 is the hub's mark of a hidden class."""
    return names[number] if number is not None and 0 <= number < len(names) else None


def _kind(path: Path) -> tuple[str, Open | None]:
    """The suffix that tells how a file is read, and what unpacks it."""
    suffixes = ["", "", *(s.lower() for s in path.suffixes)]
    unpack = _UNPACKERS.get(suffixes[-1])
    return suffixes[-2 if unpack else -1], unpack


def _pieces(opened: Callable[[], BinaryIO]) -> Iterator[str]:
    """The text of a file, without a byte order mark, in pieces that end where a line does.

    Raises DataError, with the line's number, if it is not UTF-8.
    """
    line, blocks = 1, list[bytes]()
    with opened() as stream:
        while block := stream.read(PIECE):
            end = block.rfind(b"\n") + 1
            if not end:
                blocks.append(block)
                continue
            data = b"".join([*blocks, block[:end]])
            yield decoded(data, line)
            line, blocks = line + data.count(b"\n"), [block[end:]]
    if data := b"".join(blocks):
        yield decoded(data, line)


def _separated(opened: Callable[[], BinaryIO], columns: Columns, delimiter: str) -> Iterator[Row]:
    return separated(lambda: _pieces(opened), delimiter, columns)


def _json(opened: Callable[[], BinaryIO], columns: Columns) -> Iterator[Row]:
    """A list of objects, or one object per line; all columns."""
    pieces, text = _pieces(opened), ""
    while not text.strip() and (piece := next(pieces, "")):
        text += piece
    if text.lstrip().startswith("["):
        values = iter(parse_json("".join([text, *pieces])))
    else:
        values = _lines(chain([text], pieces))
    for number, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise DataError(f"row {number} is not an object")
        yield row


def _lines(pieces: Iterable[str]) -> Iterator[Any]:
    lines = (line for piece in pieces for line in piece.split("\n") if line.strip())
    for number, line in enumerate(lines, 1):
        try:
            yield parse_json(line)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error


def _parquet(opened: Callable[[], BinaryIO], columns: Columns) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with opened() as stream:
        plain = isinstance(stream, BufferedReader)  # what is unpacked cannot be read backwards
        file = ParquetFile(stream if plain else pyarrow.BufferReader(stream.read()))
        header = file.schema_arrow.names
        distinct(header)
        places = needed(header, columns)
        kept = None if places is None else [header[i] for i in places]
        for batch in file.iter_batches(batch_size=1024, columns=kept, use_threads=False):
            table = pyarrow.Table.from_batches([batch])
            for i, field in enumerate(table.schema):
                if field.type in (pyarrow.float16(), pyarrow.float32()):
                    # By its shortest text: 0.1 is 0.1, as every other kind of file would have it.
                    exact = table[i].cast(pyarrow.string()).cast(pyarrow.float64())
                    table = table.set_column(i, field.name, exact)
            names = table.column_names
            for row in zip(*map(values, table.columns), strict=True):
                yield dict(zip(names, row, strict=True))


def _plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _zstd(path: Path) -> BinaryIO:
    import pyarrow

    stream: BinaryIO = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return stream


_READERS: dict[str, Callable[[Callable[[], BinaryIO], Columns], Iterator[Row]]] = {
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
}
_UNPACKERS: dict[str, Open] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}
