"""Runs CUDA kernels on the host: their sources as C++, by the fibers of cuda_emulator.h.

Threads and blocks take turns by chance, from a seed. Built with ThreadSanitizer (``watched``), a
missing barrier, fence or atomic is seen whatever the order. What is left to a GPU: how its memory
really orders what nothing orders here, and its own rounding.
"""

import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# Small blocks: a thread under ThreadSanitizer costs much, and races need few.
SMALL = {"kLanes = 32": "kLanes = 2", "kThreads = 256": "kThreads = 8"}


def emulated(name: str, small: bool = False, fault: tuple[str, str] = ("", "")) -> str:
    """``csrc/cuda/<name>`` as a C++ program's beginning, its launches turned into emulations.

    Args:
        small: blocks of few threads.
        fault: text of the source, and what is to stand there.
    """
    text = (CSRC / "cuda" / name).read_text()
    assert fault[0] in text
    text = text.replace(*fault, 1) if fault[0] else text
    for real, fewer in SMALL.items() if small else ():
        text = text.replace(real, fewer)
    text = text.replace('"convert.cuh"', f'"{CSRC / "cuda" / "convert.cuh"}"')
    text = re.sub(r'"(\w+_cuda\.h)"', rf'"{CSRC / "cuda"}/\1"', text)
    text = re.sub(r'"\.\./(\w+\.h)"', rf'"{CSRC}/\1"', text)
    text = re.sub(r"__global__ void __launch_bounds__\(.*?\)\n", "void ", text)
    text = text.replace("__device__ __forceinline__", "inline").replace("__device__ ", "")
    text = text.replace("__grid_constant__ ", "")
    text = re.sub(
        r"__shared__ (\w+) (\w+)((?:\[[^\]]+\])*);",
        r"auto& \2 = emulator::shared<\1\3>(__LINE__);",
        text,
    )
    text = re.sub(
        r"(\w+(?:<[^<>]*>)?)<<<grid, block, 0, stream>>>\((.*?)\);",
        r"emulator::launch(grid, block, [&] { \1(\2); });",
        text,
        flags=re.DOTALL,
    )
    assert "<<<" not in text and "__shared__" not in text
    return f'#include "{HERE / "cuda_emulator.h"}"\n' + text


def build(source: str, program: Path, *flags: str, watched: bool = False) -> None:
    """Compile with the host's compiler; watched: under ThreadSanitizer."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    path = program.with_suffix(".cpp")
    path.write_text(source)
    sanitize = ["-Xcompiler=-fsanitize=thread,-g"] if watched else []
    level = "-O1" if watched else "-O2"
    command = [nvcc, "-x", "c++", "-std=c++17", level, "-Xcompiler=-w", *sanitize, *flags]
    done = subprocess.run([*command, path, "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
