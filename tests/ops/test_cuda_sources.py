"""The CUDA sources without a GPU: they compile without spills, and their threads, run on the
host, compute the right numbers. The shared arithmetic keeps fp32 sums at rounding level.
"""

import re
import shutil
import subprocess

import pytest
from cuda_emulator import CSRC, emulated

HEADER = CSRC / "bias_grad_stats.h"


@pytest.fixture
def nvcc():
    return shutil.which("nvcc") or pytest.skip("nvcc is not on PATH")


def output_of(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("bias_grad_stats.cu", 7),  # two load widths for three dtypes, and the second stage
        ("bias_adamw_step.cu", 4),  # norm and step, for few tensors and for many
    ],
)
def test_kernels_compile_without_spills(nvcc, tmp_path, name, kernels, architecture):
    report = output_of(
        nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", f"-arch={architecture}",
        "-c", CSRC / "cuda" / name, "-o", tmp_path / "kernels.o",
    )  # fmt: skip
    entries = re.findall(r"Compiling entry function '(\w+)' for", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", report)]
    print(architecture, *zip(entries, registers, strict=True), sep="\n")
    assert len(entries) == kernels
    assert set(spills) == {("0", "0")}
    assert max(registers) <= 128  # two blocks of 256 threads on an SM


SUMMATION = r"""
#include "HEADER"
#include <cmath>
#include <cstdio>
#include <limits>

int main() {
  const float unit = 5.9604645e-08f;
  beft::Compensated sum, left, right;
  long double exact = 0, magnitude = 0;
  float plain = 0;
  unsigned state = 1;
  for (int i = 0; i < 10000000; ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = float(state >> 8) / 16777216.0f - 0.25f;
    sum.add(x);
    (i % 2 ? left : right).add(x);
    plain += x;
    exact += x;
    magnitude += std::fabs(x);
  }
  left.merge(right);
  const double error = std::fabs(double(sum.value() - exact));
  const double merged = std::fabs(double(left.value() - exact));
  const double plainly = std::fabs(double(plain - exact));
  std::printf("sum %.1Lf error %.3g merged %.3g plain %.3g\n", exact, error, merged, plainly);
  if (error > 2 * unit * magnitude || merged > 2 * unit * magnitude) return 1;
  if (plainly < 100 * error) return 2;  // the sum must be one that needs compensation

  beft::Compensated cancelling;  // 1e8 + 1000 * 0.25 - 1e8
  cancelling.add(1e8f);
  for (int i = 0; i < 1000; ++i) cancelling.add(0.25f);
  cancelling.add(-1e8f);
  if (cancelling.value() != 250.0f) return 3;

  beft::Compensated infinite;
  infinite.add(std::numeric_limits<float>::infinity());
  infinite.add(1.0f);
  if (!std::isinf(infinite.value())) return 4;
  infinite.add(std::nanf(""));
  return std::isnan(infinite.value()) ? 0 : 5;
}
"""


def test_compensated_sum_of_ten_million_floats(tmp_path):
    compiler = shutil.which("g++") or pytest.skip("g++ is not on PATH")
    source, program = tmp_path / "summation.cpp", tmp_path / "summation"
    source.write_text(SUMMATION.replace("HEADER", str(HEADER)))
    output_of(compiler, "-std=c++17", "-O3", "-march=native", source, "-o", program)
    print(output_of(program))


CHECK = r"""
struct Case { int64_t b, t, h, sb, st, sh; std::vector<int64_t> offsets; };

template <typename T> bool right(const Case& c, int dtype) {
  const double unit = std::ldexp(1.0, -24);
  const bool packed = !c.offsets.empty();
  const float scale = -0.625f;
  const int64_t size = 1 + (packed ? 0 : c.b * std::abs(c.sb)) + c.t * c.st + c.h * c.sh;
  // The same values at an aligned address and one element further: vector and scalar loads.
  std::vector<uint4> storage[2];
  std::vector<float> runs[2];
  for (int shift = 0; shift < 2; ++shift) {
    storage[shift].resize((size + 1) * sizeof(T) / 16 + 1);
    T* x = reinterpret_cast<T*>(storage[shift].data()) + shift;
    unsigned state = 7;
    for (int64_t i = 0; i < size; ++i) {
      state = state * 1664525u + 1013904223u;
      x[i] = T(float(state >> 8) / 16777216.0f - 0.4f);
    }
    std::vector<float> work(beft_bias_grad_stats_workspace(c.b, c.t, c.h) + 2, NAN);
    auto& run = runs[shift];
    run.assign(3 * c.h, 0.5f);
    if (beft_bias_grad_stats_cuda(x, dtype, c.b, c.t, c.h, c.sb, c.st, c.sh,
                                  packed ? c.offsets.data() : nullptr, scale, work.data(),
                                  run.data(), run.data() + c.h, run.data() + 2 * c.h, nullptr))
      return false;
    for (int64_t h = 0; h < c.h; ++h) {
      double grad = 0, all = 0, squares = 0, all_squares = 0;
      for (int64_t i = 0; i < c.b; ++i) {
        double g = 0, magnitude = 0;
        const int64_t first = packed ? c.offsets[i] : 0, last = packed ? c.offsets[i + 1] : c.t;
        for (int64_t t = first; t < last; ++t) {
          const double value = float(x[(packed ? 0 : i * c.sb) + t * c.st + h * c.sh]);
          g += value;
          magnitude += std::fabs(value);
        }
        grad += g;
        all += magnitude;
        squares += scale * g * scale * g;
        all_squares += scale * magnitude * scale * magnitude;
      }
      const double off = std::fabs(run[h] - grad);
      const double sum_off = std::fabs(run[c.h + h] - (0.5 + scale * grad));
      const double squares_off = std::fabs(run[2 * c.h + h] - (0.5 + squares));
      if (!(off <= 2 * unit * all && sum_off <= 4 * unit * (0.5 + all) &&
            squares_off <= 8 * unit * (0.5 + all_squares))) {
        std::printf("column %ld: off by %g, %g, %g\n", long(h), off, sum_off, squares_off);
        return false;
      }
    }
  }
  return std::memcmp(runs[0].data(), runs[1].data(), runs[0].size() * sizeof(float)) == 0;
}

int main() {
  const std::vector<Case> cases = {
      {3, 7, 5, 35, 5, 1, {}},           {1, 1009, 40, 0, 40, 1, {}},
      {2, 131, 264, 131 * 264, 264, 1, {}}, {4, 67, 1, 67, 1, 1, {}},
      {1, 1, 1, 1, 1, 1, {}},            {0, 4, 3, 12, 3, 1, {}},
      {2, 0, 3, 0, 3, 1, {}},            {2, 3, 0, 0, 0, 1, {}},
      {3, 37, 19, 37 * 19, 1, 37, {}},   {3, 37, 24, 24, 72, 1, {}},
      {3, 37, 16, 0, 0, 1, {}},          {19, 3, 8, 24, 8, 1, {}},
      {4, 211, 16, 0, 16, 1, {0, 5, 5, 150, 211}}, {3, 211, 17, 0, 17, 1, {0, 0, 199, 211}},
      {2, 0, 17, 0, 17, 1, {0, 0, 0}},
  };
  int wrong = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    const bool ok[] = {right<float>(cases[i], 0), right<__nv_bfloat16>(cases[i], 1),
                       right<__half>(cases[i], 2)};
    for (int d = 0; d < 3; ++d)
      if (!ok[d]) std::printf("case %zu dtype %d is wrong\n", i, d), ++wrong;
  }
  return wrong;
}
"""


def test_kernels_emulated_on_the_host_match_double(nvcc, tmp_path):
    source, program = tmp_path / "emulated.cpp", tmp_path / "emulated"
    source.write_text(emulated("bias_grad_stats.cu") + CHECK)
    output_of(nvcc, "-x", "c++", "-std=c++20", "-O2", "-Xcompiler=-pthread,-w",
              source, "-o", program)  # fmt: skip
    print(output_of(program))
