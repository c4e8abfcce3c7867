"""The CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer: ``python tests/sanitize``.

Builds operators.cpp with the kernels, once for each, and runs it. What is not here is said.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC, SHARED = ROOT / "csrc", ROOT / "benchmarks" / "guard"
FLAGS = ["-O1", "-g", "-std=c++17", "-ffp-contract=off", "-fno-sanitize-recover=all"]
SANITIZERS = {"address,undefined": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}


def missing(libraries: list[str]) -> str:
    """Why this cannot run here, or nothing."""
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    for name in libraries:
        command = ["g++", f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            return f"{name} is not installed"
    return ""


def watched(sanitizer: str) -> bool:
    sources = [HERE / "operators.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "operators"
        flags = [*FLAGS, f"-fsanitize={sanitizer}", f"-I{CSRC}", f"-I{SHARED}", "-pthread"]
        subprocess.run(["g++", *flags, *sources, "-ldl", "-o", program], check=True)
        print(f"sanitize: {sanitizer}: ", end="", flush=True)
        return subprocess.run([program]).returncode == 0


def main() -> int:
    clean = True
    for sanitizer, libraries in SANITIZERS.items():
        reason = missing(libraries)
        if reason:
            print(f"sanitize: {sanitizer}: skipped, {reason}")
        else:
            clean = watched(sanitizer) and clean
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
