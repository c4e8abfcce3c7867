"""Runs CUDA kernels on the host: one thread for each thread of a block, blocks one by one.

It proves arithmetic and addresses: what a kernel computes where its threads meet at every barrier.
It does not prove synchronisation. Blocks never run at the same time, ``__threadfence`` does
nothing, ``atomicAdd`` is a plain addition, and a barrier that is missing within a block is noticed
only where the host's threads happen to meet wrongly. Races, and whatever rests on the order of
blocks, are for a GPU and compute-sanitizer.
"""

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"

PREAMBLE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

static thread_local uint3 threadIdx;
static dim3 blockIdx, gridDim;
static std::barrier<>* block_barrier;
static void __syncthreads() { block_barrier->arrive_and_wait(); }
static void __threadfence() {}
template <typename T> T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) { std::puts("misaligned load"); std::exit(9); }
  return *p;
}
template <typename T> T __ldcg(const T* p) { return *p; }
static unsigned atomicAdd(unsigned* p, unsigned n) { unsigned old = *p; *p += n; return old; }
#define cudaGetLastError() cudaSuccess

template <typename Kernel> void emulate(dim3 grid, dim3 block, Kernel kernel) {
  std::barrier<> barrier(block.x * block.y);
  block_barrier = &barrier;
  gridDim = grid;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < block.x * block.y; ++t)
    threads.emplace_back([&, t] {
      threadIdx = {t % block.x, t / block.x, 0};
      for (unsigned b = 0; b < grid.x * grid.y; ++b) {
        if (t == 0) blockIdx = dim3(b % grid.x, b / grid.x);
        __syncthreads();
        kernel();
        __syncthreads();
      }
    });
  for (auto& thread : threads) thread.join();
}
"""


def emulated(name: str) -> str:
    """``csrc/cuda/<name>`` as a C++ program's beginning, its launches turned into emulations."""
    text = (CSRC / "cuda" / name).read_text()
    text = text.replace('"convert.cuh"', f'"{CSRC / "cuda" / "convert.cuh"}"')
    text = re.sub(r'"(\w+_cuda\.h)"', rf'"{CSRC / "cuda"}/\1"', text)
    text = re.sub(r'"\.\./(\w+\.h)"', rf'"{CSRC}/\1"', text)
    text = re.sub(r"__global__ void __launch_bounds__\(.*?\)\n", "void ", text)
    text = text.replace("__device__ __forceinline__", "inline").replace("__device__ ", "")
    text = text.replace("__shared__", "static").replace("__grid_constant__ ", "")
    text = re.sub(
        r"(\w+(?:<[^<>]*>)?)<<<grid, block, 0, stream>>>\((.*?)\);",
        r"emulate(grid, block, [&] { \1(\2); });",
        text,
        flags=re.DOTALL,
    )
    assert "<<<" not in text
    return PREAMBLE + text
