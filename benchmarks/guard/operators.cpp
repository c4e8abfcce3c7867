// Calls each CPU operator once per case on one thread, for callgrind to count. Every case runs
// twice: the first call pays for what happens once a process, the second is counted and dumped
// under the case's name.
#include <valgrind/callgrind.h>

#include <cstdio>
#include <string>
#include <vector>

#include "adamw_case.h"
#include "cpu/bias_grad_stats_cpu.h"

namespace {

const char* const DTYPES[] = {"fp32", "bf16", "fp16"};

template <typename Call>
void count(const std::string& name, Call call) {
  call();
  CALLGRIND_TOGGLE_COLLECT;
  call();
  CALLGRIND_TOGGLE_COLLECT;
  CALLGRIND_DUMP_STATS_AT(name.c_str());
}

// A repeatable 16-bit or 32-bit pattern: finite in each dtype.
std::vector<float> values(int64_t n, int dtype) {
  const uint32_t pattern[] = {0x3f000000u, 0x3f003f00u, 0x38003800u};
  std::vector<float> x(n);
  for (float& v : x) v = beft::bits_as<float>(pattern[dtype]);
  return x;
}

void sums(int64_t batch, int64_t tokens, int64_t width, int dtype) {
  const std::vector<float> dy = values(batch * tokens * width, dtype);
  std::vector<float> out((batch + 3) * width);
  const beft::GradView view{
      dy.data(), beft::DType(dtype), batch, tokens, width, tokens * width, width, 1, nullptr};
  const std::string shape =
      std::to_string(batch) + "x" + std::to_string(tokens) + "x" + std::to_string(width);
  count("bias_grad_stats " + shape + " " + DTYPES[dtype],
        [&] { beft::bias_grad_stats_cpu(view, 16.0f, 1, &out[0], &out[width], &out[2 * width]); });
  for (const int to : {0, 1}) {
    const beft::RowsView rows{out.data(), beft::DType(to), width};
    count("bias_example_grads " + shape + " " + DTYPES[dtype] + " to " + DTYPES[to],
          [&] { beft::bias_example_grads_cpu(view, 16.0f, 1, rows); });
  }
}

void adamw(int64_t tensors, int64_t width, int dtype, double max_grad_norm) {
  std::vector<float> param = values(tensors * width, dtype), grad = param;
  AdamWCase own(tensors, width, dtype, max_grad_norm);
  for (int64_t t = 0; t < tensors; ++t) {
    const int64_t at = t * width * (dtype ? 2 : 4);
    own.add(reinterpret_cast<char*>(param.data()) + at, reinterpret_cast<char*>(grad.data()) + at);
  }
  const std::string shape = std::to_string(tensors) + "x" + std::to_string(width);
  const std::string clipped = max_grad_norm > 0 ? " clipped" : "";
  count("bias_adamw_step " + shape + " " + DTYPES[dtype] + clipped,
        [&] { beft::bias_adamw_step_cpu(own.view, 1); });
}

}  // namespace

int main() {
  for (int dtype = 0; dtype < 3; ++dtype) {
    sums(16, 128, 768, dtype);
    sums(3, 37, 131, dtype);
    adamw(96, 768, dtype, 0.0);
    adamw(12, 4096, dtype, 1.0);
  }
}
