"""Timing, memory and records: what every benchmark here does in the same way."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from beft_ext.commands.memory import peak_bytes
from beft_ext.files import whole_file
from beft_ext.ops import backends

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("peft", "opacus", "bitsandbytes", "backpack-for-pytorch", "traker", "triton")
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
    for i in range(rounds):
        for name in list(cases)[:: -1 if i % 2 else 1]:
            elapsed = (_on_gpu if device == "cuda" else _on_cpu)(cases[name], repeat)
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
    if len(values) == 1:
        return dict.fromkeys(("median_s", "q1_s", "q3_s"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median_s": middle, "q1_s": low, "q3_s": high}


def measure(
    makers: Mapping[str, Callable[[], Case]],
    settings: argparse.Namespace,
    *,
    rounds: int | None = None,
    repeat: int = 1,
    memory: bool = False,
    warm: bool = True,
) -> dict[str, dict[str, Any]]:
    """Times and, with ``memory``, peaks of each case, by name.

    A case is made and, with ``warm``, called first; one that fails then is kept as
    ``{"missing": reason}``.
    """
    cases: dict[str, Case] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            cases[name] = make()
            peak = _second_peak(cases[name], settings.device) if memory else None
            if warm and not memory:
                cases[name]()
            found[name] = {} if peak is None else {"peak_bytes": peak}
        except Exception as error:  # whatever a peer raises is its result
            cases.pop(name, None)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found[name] = {"missing": f"{type(error).__name__}: {lines[0]}"[:160]}
    times = interleaved(cases, rounds or settings.rounds, settings.device, repeat)
    return {name: values | times.get(name, {}) for name, values in found.items()}


def show(title: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a case: median, quartiles, ratio to the case ``ours``, peak memory."""
    ours = found.get("ours", {}).get("median_s")
    for case, s in found.items():
        if "missing" in s:
            print(f"{title:<30} {case:<32} missing: {s['missing']}", flush=True)
            continue
        milliseconds = "  ".join(f"{s[k] * 1e3:10.3f}" for k in ("median_s", "q1_s", "q3_s"))
        ratio = f"  x{s['median_s'] / ours:7.3f}" if ours else ""
        peak = f"{s['peak_bytes'] / 2**20:9.1f} MiB" if "peak_bytes" in s else ""
        print(f"{title:<30} {case:<32} {milliseconds} ms{ratio} {peak}", flush=True)


def settings(doc: str | None, rounds: int, **options: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments of every benchmark, and its own ``options``: --name -> of add_argument."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each case")
    parser.add_argument("--quick", action="store_true", help="smallest sizes; writes no results")
    for name, option in options.items():
        parser.add_argument(f"--{name}", **option)
    found = parser.parse_args()
    if found.quick:
        found.rounds = 2
    torch.manual_seed(0)
    return found


def _second_peak(case: Case, device: str) -> int:
    """What is allocated once and for all does not count."""
    case()
    return peak_bytes(case, device)


def _cpuinfo() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.is_file() else []


def _processor() -> str:
    names = [x for x in _cpuinfo() if x.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor()


def _clock(device: str) -> float | None:
    """MHz of the processor's first core, or of the GPU's multiprocessors; None where unknown."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        if shutil.which(query[0]) is None:
            return None
        return float(subprocess.run(query, capture_output=True, text=True).stdout.split()[0])
    return next((float(x.split(":")[1]) for x in _cpuinfo() if x.startswith("cpu MHz")), None)


def _commit() -> str | None:
    """The commit that was measured, with '-dirty' where code differs; None where git is mute."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(ROOT)]
    told = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    code = ["diff", "--quiet", "HEAD", "--", "*.py", "csrc"]
    changed = told.stdout and subprocess.run([*git, *code], capture_output=True).returncode
    return told.stdout[:12] + "-dirty" * bool(changed) or None


def _peers() -> dict[str, str]:
    """Versions of the packages that benchmarks hold beside ours, as far as they are installed."""
    found = {}
    for name in PEERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write(name: str, settings: argparse.Namespace, results: Mapping[str, object]) -> None:
    """Keep ``results`` as benchmarks/results/<device>/<name>.json, with when, how and on what they
    were measured; not of a quick run."""
    if settings.quick:
        return
    device = settings.device
    record = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _commit(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "peers": _peers(),
        "backends": backends(),
        "load": os.getloadavg()[0],
        "clock_mhz": _clock(device),
        "kernel_digest": digest(),
        **results,
    }
    with whole_file(ROOT / "benchmarks" / "results" / device / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
