"""What the guard counts: instructions of the CPU operators, registers and spills of GPU kernels.

Each measure has ``versions()``, the tools that its numbers depend on or the reason why they are
not here (a ``Missing``), and ``counts()``.
"""

from __future__ import annotations

import distutils.core
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Target and name, without the hash that nvcc puts before what stands in the anonymous namespace.
NVCC_ENTRY = (
    r"Compiling entry function '(?:_ZN\d+_GLOBAL__N__[0-9a-f]+_\d+_\w+?_cu_[0-9a-f]{8})?(\w+)'"
    r" for '(sm_\d+)'"
)
TRITON_ENTRY = r"^kernel (.+) for (sm_\d+):$"


class Missing(Exception):
    """A tool that is not here; the message is the reason for the one who reads it."""


def output_of(*command: object, **environment: str) -> str:
    """Both streams of a command. Raises RuntimeError with them where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def tool(name: str) -> str:
    """Path of a program. Raises Missing."""
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not on PATH")
    return found


def build() -> distutils.core.Distribution:
    """What setup.py says of the native module."""
    return distutils.core.run_setup(str(ROOT / "setup.py"), stop_after="init")


class Instructions:
    """Of one call of a CPU operator on one thread, under callgrind: the x86-64-v3 clone, the
    widest that valgrind knows."""

    @staticmethod
    def versions() -> dict[str, str]:
        if platform.machine() != "x86_64" or " avx2 " not in Path("/proc/cpuinfo").read_text():
            raise Missing("this processor has no AVX2")
        if not Path("/usr/include/valgrind/callgrind.h").is_file():
            raise Missing("valgrind's headers are not installed")
        valgrind = output_of(tool("valgrind"), "--version").strip()
        compiler = output_of(tool("g++"), "-dumpfullversion").strip()
        return {"valgrind": valgrind, "g++": compiler, "libc": " ".join(platform.libc_ver())}

    @staticmethod
    def counts() -> dict[str, int]:
        # The flags and sources of the module itself.
        module = build().ext_modules[0]
        kernels = [s for s in module.sources if s.startswith("csrc/cpu/")]
        with tempfile.TemporaryDirectory() as folder:
            program, out = Path(folder) / "operators", Path(folder) / "counts"
            driver = HERE / "operators.cpp"
            flags = module.extra_compile_args
            output_of("g++", *flags, "-Icsrc", driver, *kernels, "-ldl", "-o", program)
            tools = ("--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}")
            output_of("valgrind", *tools, program)
            return dict(_dump(p) for p in sorted(Path(folder).glob("counts.*")) if _dump(p)[0])


def _dump(path: Path) -> tuple[str, int]:
    text = path.read_text()
    name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
    total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
    return (name[1] if name else ""), int(total[1]) if total else 0


class Registers:
    """Registers a thread, and bytes spilled, of every GPU kernel for every target."""

    @staticmethod
    def versions() -> dict[str, str]:
        release = re.search(r"V([\d.]+)", output_of(tool("nvcc"), "--version"))
        found = {"nvcc": release[1] if release else "unknown"}
        if importlib.util.find_spec("triton") is None:
            raise Missing("triton is not installed")
        return {**found, "triton": importlib.metadata.version("triton")}

    @staticmethod
    def counts() -> dict[str, int]:
        found: dict[str, int] = {}
        flags = build().cmdclass["build_ext"].cuda_flags(tool("nvcc"))
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
            report = output_of("nvcc", *flags, "-Xptxas=-v", "-c", source, "-o", "/dev/null")
            found |= read_report(report, NVCC_ENTRY, source.name)
        capabilities = re.findall(r"code=sm_(\d+)", " ".join(flags))
        with tempfile.TemporaryDirectory() as cache:
            environment = {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
            environment["PYTHONPATH"] = str(ROOT)
            script = HERE / "triton_kernels.py"
            report = output_of(sys.executable, script, *capabilities, **environment)
        return found | read_report(report, TRITON_ENTRY, "triton")


def read_report(report: str, entry: str, where: str) -> dict[str, int]:
    """``<where> <target> <kernel>: registers`` and ``...: spilled bytes`` from what ptxas says
    after each line that the pattern ``entry`` finds a kernel's name and its target in."""
    found: dict[str, int] = {}
    _, *parts = re.split(entry, report, flags=re.MULTILINE)
    for name, target, said in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        registers = re.search(r"Used (\d+) registers", said)
        if not spills or not registers:
            raise RuntimeError(f"ptxas says nothing of {name} for {target}:\n{said}")
        found[f"{where} {target} {name}: registers"] = int(registers[1])
        found[f"{where} {target} {name}: spilled bytes"] = sum(map(int, spills[0]))
    return found
