"""Build of the native module. All metadata is in pyproject.toml.

The module links against no torch: kernels take raw pointers, and the operators are registered
with the dispatcher from Python. So no torch is needed to build, one wheel serves every torch,
and there is no ABI that could mismatch. Without a compiler the install succeeds all the same
(``optional=True``), and the package runs on its other backends.

BEFT_CUDA=0 skips the CUDA kernels; otherwise they are built where nvcc is found.
"""

import os
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# GPUs that get machine code, each as far as nvcc knows it: T4, A100, RTX 30, RTX 40 and L4, H100,
# B200, RTX 50.
CUDA_TARGETS = ("75", "80", "86", "89", "90", "100", "120")
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))


def cuda_flags(nvcc: str) -> list[str]:
    """nvcc's arguments: machine code for each target, and PTX of the newest for later GPUs."""
    asked = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    targets = [t for t in CUDA_TARGETS if f"sm_{t}" in asked.stdout.split()]
    gencode = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    gencode += [f"-gencode=arch=compute_{t},code=compute_{t}" for t in targets[-1:]]
    at_once = f"--threads={os.cpu_count() or 1}"
    return ["-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Icsrc", at_once, *gencode]


class BuildNative(build_ext):
    cuda_flags = staticmethod(cuda_flags)  # for the guard, which runs this file

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        nvcc = shutil.which("nvcc")
        if nvcc and os.environ.get("BEFT_CUDA", "1") != "0":
            self.add_cuda(ext, nvcc)
        super().build_extension(ext)

    def add_cuda(self, ext: Extension, nvcc: str) -> None:
        """Compile the CUDA kernels; where that fails, say so and build the CPU part alone."""
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        objects, flags = [], cuda_flags(nvcc)
        for source in CUDA_SOURCES:
            target = str(Path(self.build_temp) / (Path(source).stem + ".cuda.o"))
            done = subprocess.run([nvcc, *flags, "-c", source, "-o", target])
            if done.returncode:
                self.warn(f"nvcc could not compile {source}: building without CUDA kernels")
                return
            objects.append(target)
        root = Path(nvcc).resolve().parent.parent
        homes = [os.environ.get("CUDA_HOME"), str(root), "/usr/local/cuda"]
        folders = [Path(h) / "lib64" for h in homes if h]
        library = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
        if library is None:
            self.warn("libcudart_static.a was not found (set CUDA_HOME): building without CUDA")
            return
        ext.extra_objects += objects
        ext.define_macros.append(("BEFT_WITH_CUDA", "1"))
        ext.include_dirs.append(str(library.parent / "include"))
        ext.library_dirs.append(str(library))
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]


setup(
    ext_modules=[
        Extension(
            "beft_ext._native",
            sources=["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            depends=[*glob("csrc/*.h"), *glob("csrc/*/*.*h"), *CUDA_SOURCES],
            include_dirs=["csrc"],
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",  # else AVX2 converts halves one by one; no value changes
                "-fopenmp-simd",  # the pragma alone; threads come from cpu/parallel.h
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            libraries=["dl"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
