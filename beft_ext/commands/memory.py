"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch


def peak_bytes(work: Callable[[], object], device: torch.device | str) -> int:
    """Most memory that torch's allocator had handed out at once during one call of ``work``,
    beyond what was in use before it. Exact and repeatable: not the size of a process."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of each start and end
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(nbytes for _, nbytes in sorted(changes)))
