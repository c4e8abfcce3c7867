"""The classes of a classification that names none: the sorted set of the training rows' labels."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from beft_ext.tasks.cells import BOOLEANS, DataError, Row, key, labels, shown

MOST_CLASSES = 10_000
REGRESSION = "for numbers that are to be predicted, give --kind regression"


def classes_in(rows: Iterable[tuple[int, Row]], column: str, where: str) -> tuple[str, ...]:
    """Names of the classes, in their order: whole numbers by size, before words by letters.

    What is one class in a cell (``key``) is one here: ``1``, ``1.0`` and ``"1"``; ``true`` and
    ``"True"``. A class is called by its number, by True or False where it is never written as a
    number, or by its word.

    Args:
        rows: with their numbers, for messages.
        column: with the labels.
        where: the file's name, for messages.
    Raises:
        DataError: for a label that is blank, a list or a fraction; for two words that differ by
            capitals or spaces alone; for fewer than two classes, or more than 10,000.
    """
    found: dict[str | Decimal, str] = {}
    for number, row in rows:
        try:
            written = _label(row, column)
        except DataError as error:
            raise DataError(f"{where}, row {number}: {error}") from error
        place = key(written)
        if isinstance(place, str) or written.strip().casefold() not in BOOLEANS:
            found[place] = place if isinstance(place, str) else str(int(place))
        else:
            found.setdefault(place, str(bool(place)))
        if len(found) > MOST_CLASSES:
            raise DataError(f"{where}: more than {MOST_CLASSES} classes; {REGRESSION}")
    if len(found) < 2:
        alone = shown(next(iter(found.values()), ""))
        raise DataError(
            f"{where}: every row has the label '{alone}', and a classification needs two classes"
        )
    _check_words([name for place, name in found.items() if isinstance(place, str)], where)
    ordered = sorted(found, key=lambda k: (isinstance(k, str), k))
    return tuple(found[place] for place in ordered)


def _label(row: Row, column: str) -> str:
    written = labels(row, column)
    if len(written) != 1:
        raise DataError(f"column '{shown(column)}' lists {len(written)} classes, not one")
    if not written[0].strip():
        raise DataError(f"column '{shown(column)}' is blank: leave out the rows without a label")
    place = key(written[0])
    if isinstance(place, Decimal) and (abs(place) >= 2**53 or place % 1):
        raise DataError(f"label '{shown(written[0])}' is a number and no class: {REGRESSION}")
    return written[0]


def _check_words(words: list[str], where: str) -> None:
    seen: dict[str, str] = {}
    for word in words:
        other = seen.setdefault(" ".join(word.split()).casefold(), word)
        if other != word:
            raise DataError(
                f"{where}: the classes '{shown(other)}' and '{shown(word)}' differ by capitals or "
                "spaces alone: write them alike, or name both as 'classes' in a --task-config"
            )
