"""The CUDA sources without a GPU: they compile without spills, and their threads, run on the
host in any order, compute the right numbers (cuda_emulator.py; test_cuda_races.py has the races).
The shared arithmetic keeps fp32 sums at rounding level.
"""

import re
import shutil
import subprocess

import pytest
from cuda_emulator import CSRC, build, emulated

HEADER = CSRC / "bias_grad_stats.h"


@pytest.fixture
def nvcc():
    return shutil.which("nvcc") or pytest.skip("nvcc is not on PATH")


def output_of(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("architecture", ["sm_75", "sm_120"])  # the guard takes all
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        # Two load widths for three dtypes, and the second stages: columns, and rows of two dtypes.
        ("bias_grad_stats.cu", 9),
        ("bias_adamw_step.cu", 6),  # norm and step, for few tensors, some and many
    ],
)
def test_kernels_compile_without_spills(nvcc, tmp_path, name, kernels, architecture):
    if architecture not in output_of(nvcc, "--list-gpu-code").split():
        pytest.skip(f"nvcc does not know {architecture}")
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
    assert max(registers) <= 64  # four blocks of 256 threads on a multiprocessor


SUMMATION = r"""
#include "HEADER"
#include <cmath>
#include <cstdio>
#include <initializer_list>
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

  beft::Compensated small_first;  // where only the larger one's error is kept, 1 is lost
  for (float x : {1.0f, 33554432.0f, -33554432.0f, 1.0f}) small_first.add(x);
  if (small_first.value() != 2.0f) return 6;

  beft::Compensated a, b;  // and so when two sums merge: the errors of both count
  a.add(1.0f), a.add(33554432.0f);
  b.add(1.0f), b.add(-33554432.0f);
  a.merge(b);
  if (a.value() != 2.0f) return 7;

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
struct Case { int64_t b, t, h, sb, st, sh, chunks; std::vector<int64_t> offsets; };

int64_t clamp(int64_t row, int64_t rows) { return std::min(std::max(row, int64_t{0}), rows); }

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
    std::vector<float> work(2 * c.b * c.chunks * c.h + 2, NAN);
    auto& run = runs[shift];
    run.assign(3 * c.h, 0.5f);
    if (beft_bias_grad_stats_cuda(x, dtype, c.b, c.t, c.h, c.sb, c.st, c.sh,
                                  packed ? c.offsets.data() : nullptr, c.chunks, scale, work.data(),
                                  run.data(), run.data() + c.h, run.data() + 2 * c.h, nullptr))
      return false;
    for (int64_t h = 0; h < c.h; ++h) {
      double grad = 0, all = 0, squares = 0, all_squares = 0;
      for (int64_t i = 0; i < c.b; ++i) {
        double g = 0, magnitude = 0;
        const int64_t first = packed ? clamp(c.offsets[i], c.t) : 0;
        const int64_t last = packed ? clamp(c.offsets[i + 1], c.t) : c.t;
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

// The rows of the same case, in a slab with a column beside them; those of bf16 are those of fp32,
// rounded.
template <typename T> bool right_rows(const Case& c, int dtype) {
  const double unit = std::ldexp(1.0, -24);
  const bool packed = !c.offsets.empty();
  const int64_t* offsets = packed ? c.offsets.data() : nullptr;
  const float scale = -0.625f;
  const int64_t size = 1 + (packed ? 0 : c.b * std::abs(c.sb)) + c.t * c.st + c.h * c.sh;
  std::vector<uint4> storage((size + 1) * sizeof(T) / 16 + 1);
  T* x = reinterpret_cast<T*>(storage.data());
  unsigned state = 7;
  for (int64_t i = 0; i < size; ++i) {
    state = state * 1664525u + 1013904223u;
    x[i] = T(float(state >> 8) / 16777216.0f - 0.4f);
  }
  const int64_t stride = c.h + 1;
  std::vector<float> work(2 * c.b * c.chunks * c.h + 2, NAN), rows(c.b * stride, 7.0f);
  std::vector<__nv_bfloat16> halves(c.b * stride, __nv_bfloat16(7.0f));
  for (int half = 0; half < 2; ++half) {
    void* out = half ? static_cast<void*>(halves.data()) : rows.data();
    if (beft_bias_example_grads_cuda(x, dtype, c.b, c.t, c.h, c.sb, c.st, c.sh, offsets, c.chunks,
                                     scale, work.data(), out, half, stride, nullptr))
      return false;
  }
  for (int64_t i = 0; i < c.b; ++i) {
    if (rows[i * stride + c.h] != 7.0f || float(halves[i * stride + c.h]) != 7.0f) return false;
    const int64_t first = packed ? clamp(c.offsets[i], c.t) : 0;
    const int64_t last = packed ? clamp(c.offsets[i + 1], c.t) : c.t;
    for (int64_t h = 0; h < c.h; ++h) {
      double g = 0, magnitude = 0;
      for (int64_t t = first; t < last; ++t) {
        const double value = float(x[(packed ? 0 : i * c.sb) + t * c.st + h * c.sh]);
        g += value;
        magnitude += std::fabs(value);
      }
      const float row = rows[i * stride + h];
      if (!(std::fabs(row - scale * g) <= 4 * unit * magnitude) ||
          float(halves[i * stride + h]) != float(__nv_bfloat16(row))) {
        std::printf("row %ld column %ld: %g, not %g\n", long(i), long(h), row, scale * g);
        return false;
      }
    }
  }
  return true;
}

// One column of values, by as many chunks: all but the errors of TwoSum cancel.
bool near(const std::vector<float>& column, int64_t chunks, double want, double bound) {
  std::vector<float> work(2 * chunks + 2), out(3);
  const int64_t rows = column.size();
  beft_bias_grad_stats_cuda(column.data(), 0, 1, rows, 1, rows, 1, 1, nullptr, chunks, 1.0f,
                            work.data(), &out[0], &out[1], &out[2], nullptr);
  if (std::isinf(want)) return out[0] == want;
  if (std::fabs(out[0] - want) <= bound) return true;
  std::printf("%ld chunks: %.9g, not %.9g\n", long(chunks), out[0], want);
  return false;
}

bool cancelling() {
  std::vector<float> column(512, 0.7f);
  column[0] = 16777216.0f;
  column[500] = -16777216.0f;
  double want = 0;
  for (float x : column) want += x;
  // The compensation keeps what a plain sum loses: here most of a unit of 2^24 a row.
  for (int64_t chunks : {1, 2, 8})
    if (!near(column, chunks, want, std::ldexp(want, -23))) return false;
  return true;
}

bool overflowing() { return near({3e38f, 3e38f, 3e38f}, 1, INFINITY, 0); }

int main() {
  const std::vector<Case> cases = {
      {3, 7, 5, 35, 5, 1, 1, {}},           {1, 1009, 40, 0, 40, 1, 16, {}},
      {2, 131, 264, 131 * 264, 264, 1, 3, {}}, {4, 67, 1, 67, 1, 1, 2, {}},
      {1, 1, 1, 1, 1, 1, 1, {}},            {0, 4, 3, 12, 3, 1, 1, {}},
      {2, 0, 3, 0, 3, 1, 1, {}},            {2, 3, 0, 0, 0, 1, 1, {}},
      {3, 37, 19, 37 * 19, 1, 37, 1, {}},   {3, 37, 24, 24, 72, 1, 5, {}},
      {3, 37, 16, 0, 0, 1, 1, {}},          {19, 3, 8, 24, 8, 1, 1, {}},
      // An odd stride of the rows, then of the examples: no vector loads.
      {1, 37, 16, 0, 17, 1, 1, {}},         {3, 5, 16, 81, 16, 1, 1, {}},
      {1, 5, 16, 0, 16, 2, 1, {}},          {2, 3, 40, 120, 40, 1, 64, {}},
      {4, 211, 16, 0, 16, 1, 4, {0, 5, 5, 150, 211}}, {3, 211, 17, 0, 17, 1, 4, {0, 0, 199, 211}},
      {2, 9, 16, 0, 17, 1, 1, {1, 4, 8}},   {2, 0, 17, 0, 17, 1, 1, {0, 0, 0}},
      // Offsets beyond the rows are clamped to them; descending ones make an empty example.
      {2, 40, 16, 0, 16, 1, 3, {-5, 20, 99}}, {3, 40, 8, 0, 8, 1, 2, {30, 10, 40, 1}},
      {2, 40, 8, 0, 8, 1, 2, {INT64_MIN / 2, 7, INT64_MAX / 2}},
  };
  int wrong = !cancelling() + !overflowing();
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    const bool ok[] = {right<float>(c, 0) && right_rows<float>(c, 0),
                       right<__nv_bfloat16>(c, 1) && right_rows<__nv_bfloat16>(c, 1),
                       right<__half>(c, 2) && right_rows<__half>(c, 2)};
    for (int d = 0; d < 3; ++d)
      if (!ok[d]) std::printf("case %zu dtype %d is wrong\n", i, d), ++wrong;
  }
  return wrong;
}
"""


def test_kernels_emulated_on_the_host_match_double(nvcc, tmp_path):
    program = tmp_path / "emulated"
    build(emulated("bias_grad_stats.cu") + CHECK, program)
    print(output_of(program))
