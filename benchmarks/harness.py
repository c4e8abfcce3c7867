"""Timing, memory and records: what every benchmark here does in the same way."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers

from beft_ext.files import whole_file
from beft_ext.ops import backends

ROOT = Path(__file__).resolve().parent.parent
Case = Callable[[], object]


def digest() -> str:
    """SHA-256 over the kernel sources that a result belongs to."""
    sources = sorted(p for p in [*ROOT.glob("csrc/**/*"), *ROOT.glob("beft_ext/ops/*.py")])
    total = hashlib.sha256()
    for path in sources:
        if path.is_file():
            total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def interleaved(
    cases: Mapping[str, Case], rounds: int, device: str, repeat: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds of each case: median and quartiles over rounds that run every case in turn.

    ``repeat`` calls make one measurement, for cases near the clock's resolution.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 2):
        for name in list(cases)[:: 1 if i % 2 else -1]:
            elapsed = (_on_gpu if device == "cuda" else _on_cpu)(cases[name], repeat)
            if i >= 2:  # two rounds of warm-up
                seconds[name].append(elapsed / repeat)
    return {name: _summary(values) for name, values in seconds.items()}


def _on_cpu(case: Case, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        case()
    return time.perf_counter() - start


def _on_gpu(case: Case, repeat: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeat):
        case()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median_s": middle, "q1_s": low, "q3_s": high}


def show(title: str, found: Mapping[str, Mapping[str, float]], base: str) -> None:
    """One line a case: median, quartiles, and the ratio to the case ``base``."""
    for case, s in found.items():
        milliseconds = "  ".join(f"{s[k] * 1e3:10.3f}" for k in ("median_s", "q1_s", "q3_s"))
        ratio = s["median_s"] / found[base]["median_s"]
        print(f"{title:<26} {case:<22} {milliseconds} ms  x{ratio:7.3f}", flush=True)


def peak_bytes(case: Case, device: str) -> int:
    """Most memory that torch's allocator had handed out at once during one call, beyond what was
    in use before it. Exact and repeatable: not the size of a process, which varies by 2 %."""
    case()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        case()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(nbytes for _, nbytes in sorted(changes)))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor()


def write(name: str, device: str, results: Mapping[str, object]) -> None:
    """Keep ``results`` as benchmarks/results/<device>/<name>.json, with all that they depend on."""
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "backends": backends(),
        "kernel_digest": digest(),
        **results,
    }
    with whole_file(ROOT / "benchmarks" / "results" / device / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
