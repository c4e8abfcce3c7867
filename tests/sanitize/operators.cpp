// Calls the CPU operators on odd shapes, strides and numbers of threads, for the sanitizers to
// watch. Every tensor is an allocation of its own and of its exact size, so that one element
// beside it is seen. Results must be the same to the bit for any number of threads.
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "adamw_case.h"
#include "cpu/bias_grad_stats_cpu.h"

namespace {

int wrong = 0;
int64_t calls = 0;

void check(bool right, const char* what) {
  if (!right) std::printf("%s\n", what), ++wrong;
}

// n numbers of a dtype, each 0.5: 16-bit numbers lie two in a word.
struct Tensor {
  Tensor(int64_t n, int64_t dtype) : bytes(new char[n * (dtype ? 2 : 4)]) {
    const uint32_t half[] = {0x3f000000u, 0x3f00u, 0x3800u};
    const int64_t size = dtype ? 2 : 4;
    for (int64_t i = 0; i < n; ++i) std::memcpy(&bytes[i * size], &half[dtype], size);
  }
  float at(int64_t i, int64_t dtype) const {  // fp32 or bf16
    uint32_t bits = 0;
    char* high = reinterpret_cast<char*>(&bits) + (dtype ? 2 : 0);
    std::memcpy(high, &bytes[i * (dtype ? 2 : 4)], dtype ? 2 : 4);
    return beft::bits_as<float>(bits);
  }
  std::unique_ptr<char[]> bytes;
};

struct Layout {
  int64_t batch, tokens, width, stride_b, stride_t, stride_h;
};

// The same examples as rows of a slab that has two columns beside them.
void rows(const beft::GradView& view, bool fit) {
  for (const int64_t dtype : {0, 1}) {
    const int64_t stride = view.width + 2;
    const Tensor slab(view.batch ? view.batch * stride - 2 : 0, dtype);
    const beft::RowsView out{slab.bytes.get(), beft::DType(dtype), stride};
    for (int threads : {1, 2, 3, 8}) {
      ++calls;
      check(beft::bias_example_grads_cpu(view, 16.0f, threads, out) == fit, "rows: offsets");
      for (int64_t i = 0; i < view.batch; ++i) {
        const int64_t length = view.offsets ? view.offsets[i + 1] - view.offsets[i] : view.tokens;
        for (int64_t h = 0; h < view.width; ++h) {
          const float want = fit ? 8.0f * float(length) : 0.5f;
          check(slab.at(i * stride + h, dtype) == want, "a row is wrong");
        }
        for (int64_t h = view.width; i + 1 < view.batch && h < stride; ++h)
          check(slab.at(i * stride + h, dtype) == 0.5f, "a column beside the rows was written");
      }
    }
  }
}

void stats(const Layout& l, int dtype, const std::vector<int64_t>& offsets, bool fit = true) {
  const bool packed = !offsets.empty();
  int64_t reach = l.tokens && l.width && (packed || l.batch)
                      ? 1 + (l.tokens - 1) * l.stride_t + (l.width - 1) * l.stride_h
                      : 0;
  if (reach && !packed) reach += (l.batch - 1) * l.stride_b;
  const Tensor dy(reach, dtype);
  const beft::GradView view{dy.bytes.get(),
                            beft::DType(dtype),
                            l.batch,
                            l.tokens,
                            l.width,
                            l.stride_b,
                            l.stride_t,
                            l.stride_h,
                            packed ? offsets.data() : nullptr};
  std::vector<float> first;
  for (int threads : {1, 2, 3, 8}) {
    std::vector<float> grad(l.width, -1.0f), sum(l.width), sum_sq(l.width);
    const bool done =
        beft::bias_grad_stats_cpu(view, 16.0f, threads, grad.data(), sum.data(), sum_sq.data());
    ++calls;
    check(done == fit, "offsets that do not ascend were taken, or others refused");
    int64_t rows = packed ? offsets.back() - offsets.front() : l.batch * l.tokens;
    if (!fit) rows = -2;  // untouched
    for (float g : grad) check(g == 0.5f * float(rows), "a gradient is wrong");
    std::vector<float> all(grad);
    all.insert(all.end(), sum_sq.begin(), sum_sq.end());
    if (threads == 1) first = all;
    check(all == first, "threads changed a result");
  }
  if (l.batch < 1000) rows(view, fit);
}

void step(int64_t tensors, int64_t width, int64_t dtype, double max_grad_norm) {
  std::vector<float> first;
  for (int threads : {1, 2, 3, 8}) {
    AdamWCase own(tensors, width, dtype, max_grad_norm);
    std::vector<Tensor> params, grads;
    for (int64_t t = 0; t < tensors; ++t) {
      params.emplace_back(width, dtype);
      grads.emplace_back(width, dtype);
      const bool without = tensors > 2 && t == 1;
      own.add(params.back().bytes.get(), without ? nullptr : grads.back().bytes.get());
    }
    for (int n = 0; n < 2; ++n) beft::bias_adamw_step_cpu(own.view, threads), ++calls;
    std::vector<float> after(own.state);
    after.insert(after.end(), own.scores.begin(), own.scores.end());
    if (threads == 1) first = after;
    check(after == first, "threads changed a step");
    for (int64_t t = 0; t < tensors; ++t)
      check(own.steps[t] == (own.view.tensors[t].grad ? 2.0f : 0.0f), "steps are miscounted");
  }
}

}  // namespace

int main() {
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (int64_t width : {0, 1, 2, 7, 16, 31, 128, 129, 300, 4097})
      for (int64_t tokens : {0, 1, 7, 8, 9, 129}) {
        stats({3, tokens, width, tokens * width, width, 1}, dtype, {});
        stats({2, tokens, width, width + 3, 2 * (width + 3), 1}, dtype, {});  // tokens first
        stats({2, tokens, width, tokens * width, 1, tokens}, dtype, {});      // transposed
        stats({2, tokens, width, 0, 0, 0}, dtype, {});                        // expanded
        stats({3, tokens, width, 0, width + 1, 1}, dtype, {0, tokens / 2, tokens / 2, tokens});
        stats({1, tokens, width, 0, 2 * width, 2}, dtype, {tokens / 3, tokens});
      }
    stats({0, 5, 3, 15, 3, 1}, dtype, {});
    stats({int64_t{1} << 40, 0, 3, 0, 3, 1}, dtype, {});
    stats({4, 2048, 768, 2048 * 768, 768, 1}, dtype, {});  // enough for every thread
    const int64_t far = int64_t{1} << 62;
    for (const std::vector<int64_t>& bad : std::vector<std::vector<int64_t>>{
             {0, 10}, {-1, 9}, {5, 4}, {0, 10, 9}, {0, far}, {-far, 9}, {0, -1, 9}})
      stats({int64_t(bad.size()) - 1, 9, 17, 0, 17, 1}, dtype, bad, false);
    for (double max_grad_norm : {0.0, 0.5})
      for (int64_t width : {0, 1, 7, 33, 1024, 1025, 70000})
        for (int64_t tensors : {1, 3, 5}) step(tensors, width, dtype, max_grad_norm);
  }
  std::printf("%ld calls, %d wrong\n", long(calls), wrong);
  return wrong != 0;
}
