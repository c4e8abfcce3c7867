"""Passes over batches that are shown as they go on."""

from __future__ import annotations

import copy

from beft_ext.progress import Count
from beft_ext.tasks import Batches


def watched(batches: Batches, what: str) -> Batches:
    """Batches whose passes are counted, each by the name ``what``."""
    found = copy.copy(batches)
    count: Count | None = None

    def taken(done: int, of: int | None) -> None:
        nonlocal count
        if done == 1 or count is None:
            if count is not None:  # of a pass that was broken off
                count.close()
            count = Count(what, of)
        count.add()
        if done == of:
            count.close()

    found.taken = taken
    return found
