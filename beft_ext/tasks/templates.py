"""Templates of texts: they name columns in braces, and can do nothing else.

No attributes, no indexing, no conversions and no widths: what stands in braces is the name of a
column, whatever its characters. So a template from a stranger reads nothing but the row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from beft_ext.tasks.cells import DataError, shown, text

_PIECE = re.compile(r"\{\{|\}\}|[{}]|[^{}]+")
_ESCAPED = {"{{": "{", "}}": "}"}


class Column(str):
    """In place of a template: the name of one column, with any characters in it."""


def fill(template: str, row: Mapping[str, object]) -> str:
    """The template with the row's texts in place of the columns' names.

    Raises:
        DataError: if the template is malformed, or the row lacks a text that it names.
    """
    pieces = parse(template)
    if len(pieces) == 1:  # one column and nothing else, as most are
        ((named, part),) = pieces
        return text(row, part) if named else part
    return "".join([text(row, part) if named else part for named, part in pieces])


@lru_cache(maxsize=256, typed=True)
def parse(template: str) -> tuple[tuple[bool, str], ...]:
    """Pieces of a template: whether each names a column, and its name or literal text.

    ``{{`` and ``}}`` are braces. Within a name they are too, as long as they pair: ``{a{{b}}}``
    is the column ``a{b}``, and ``{a}}}`` is the column ``a`` before a brace.

    Raises:
        DataError: if braces do not pair, or a pair of them names nothing.
    """
    if isinstance(template, Column):
        return ((True, str(template)),)
    pieces, piece = [], ""
    place = depth = 0  # depth: 0 in literal text, 1 in a name, 2 and more after {{ in a name
    while found := _PIECE.match(template, place):
        token = found.group()
        if depth == 1 and token == "}}":
            token = "}"  # the first brace closes the name
        place += len(token)
        if (depth, token) in ((0, "{"), (1, "}")):
            if depth and not piece:
                raise DataError(f"template '{shown(template)}': there is no name in its braces")
            pieces.append((depth == 1, piece))
            depth, piece = 1 - depth, ""
        elif token in "{}":
            depth = -1
            break
        else:
            depth += ((token == "{{") - (token == "}}")) * (depth > 0)
            piece += _ESCAPED.get(token, token)
    if depth:
        raise DataError(
            f"template '{shown(template)}': a brace without its other; "
            "write '{{' or '}}' for a brace in the text"
        )
    return tuple(p for p in (*pieces, (False, piece)) if p[1])
