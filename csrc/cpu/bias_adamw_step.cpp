// One AdamW step over all biases on the CPU, with each segment's scores from the same pass.
//
// Blocks of at most a few thousand elements are dealt to threads; each block's sums go to a slot
// of its own and are added per segment in the order of the blocks, so the result is the same for
// any number of threads. Clipping needs the global norm first: one more read of the gradients.
// Least traffic: 5 reads and 3 writes of 4 bytes an element.
#include "bias_adamw_step.h"

#include <algorithm>
#include <cmath>

#include "cpu/bias_adamw_step_cpu.h"
#include "cpu/parallel.h"

namespace beft {
namespace {

constexpr int64_t ELEMENTS_PER_THREAD = 1 << 15;  // fewer do not pay for a thread

struct Slices {
  float *master, *exp_avg, *exp_avg_sq;
  const float* initial;
};

template <typename T>
BEFT_INLINE float block_norm(const void* grad, int64_t n, float factor) {
  const auto* g = static_cast<const typename T::Raw*>(grad);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float x = T::load(g[i]) * factor;
    sum += x * x;
  }
  return sum;
}

template <typename T>
BEFT_INLINE AdamWScores block_step(void* param, const void* grad, const Slices& s, int64_t n,
                                   const AdamWFactors& factors, float unscale) {
  constexpr bool half = sizeof(typename T::Raw) == 2;
  const AdamWFactors f = factors;  // a copy: the stores below cannot alias it
  auto* p = static_cast<typename T::Raw*>(param);
  const auto* g = static_cast<const typename T::Raw*>(grad);
  float *m = s.exp_avg, *v = s.exp_avg_sq, *master = s.master;
  const float* b0 = s.initial;
  float change_abs = 0, dot = 0, change_dot = 0, grad_sq = 0;
#pragma omp simd reduction(+ : change_abs, dot, change_dot, grad_sq)
  for (int64_t i = 0; i < n; ++i) {
    const float raw = T::load(g[i]);
    float b = T::load(p[i]);
    // A parameter that is not its rounded master was written to by someone else: it counts.
    if (half && T::store(master[i]) == p[i]) b = master[i];
    adamw_element(b, m[i], v[i], raw, f);
    if (half) master[i] = b;
    p[i] = T::store(b);
    const float d = b - b0[i], x = raw * unscale;
    change_abs += std::fabs(d);
    dot += d * b0[i];
    change_dot += d * b;
    grad_sq += x * x;
  }
  return {change_abs, dot, change_dot, grad_sq};
}

#define BEFT_KERNELS(NAME, T)                                                                    \
  BEFT_CLONES float norm_##NAME(const void* grad, int64_t n, float factor) {                     \
    return block_norm<T>(grad, n, factor);                                                       \
  }                                                                                              \
  BEFT_CLONES AdamWScores step_##NAME(void* param, const void* grad, const Slices& s, int64_t n, \
                                      const AdamWFactors& f, float unscale) {                    \
    return block_step<T>(param, grad, s, n, f, unscale);                                         \
  }
BEFT_KERNELS(f32, F32)
BEFT_KERNELS(bf16, BF16)
BEFT_KERNELS(f16, F16)
#undef BEFT_KERNELS

const void* at(const void* data, int64_t dtype, int64_t offset) {
  return static_cast<const char*>(data) + offset * (DType(dtype) == DType::f32 ? 4 : 2);
}

}  // namespace

double bias_adamw_step_cpu(const AdamWView& view, int threads) {
  const int64_t count = view.block_count;
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i)
    if (view.tensors[view.blocks[i].tensor].grad) elements += view.blocks[i].length;
  const int useful =
      static_cast<int>(std::min<int64_t>(threads, 1 + elements / ELEMENTS_PER_THREAD));
  std::vector<AdamWScores> sums(count);
  const float unscale = static_cast<float>(view.inverse_scale);
  constexpr decltype(&norm_f32) norms[] = {norm_f32, norm_bf16, norm_f16};
  constexpr decltype(&step_f32) moves[] = {step_f32, step_bf16, step_f16};

  auto global_norm = [&] {
    double total = 0;
    for (const AdamWScores& s : sums) total += s.grad_sq;
    return std::sqrt(total);
  };
  double clip = 1;
  if (view.max_grad_norm > 0 && view.global_norm >= 0) {
    clip = clip_factor(view.global_norm, view.max_grad_norm);
  } else if (view.max_grad_norm > 0) {
    parallel(count, useful, [&](int64_t i) {
      const AdamWBlock& b = view.blocks[i];
      const AdamWTensor& t = view.tensors[b.tensor];
      if (t.grad)
        sums[i].grad_sq = norms[t.dtype](at(t.grad, t.dtype, b.grad_offset), b.length, unscale);
    });
    clip = clip_factor(global_norm(), view.max_grad_norm);
  }

  std::vector<AdamWFactors> factors(view.tensors.size());
  for (size_t t = 0; t < view.tensors.size(); ++t) {
    if (!view.tensors[t].grad) continue;
    view.steps[t] += 1;
    factors[t] =
        adamw_factors(view.groups[view.tensors[t].group], view.steps[t], clip * view.inverse_scale);
  }
  parallel(count, useful, [&](int64_t i) {
    const AdamWBlock& b = view.blocks[i];
    const AdamWTensor& t = view.tensors[b.tensor];
    if (!t.grad) return;
    const Slices slices{view.master ? view.master + b.flat_offset : nullptr,
                        view.exp_avg + b.flat_offset, view.exp_avg_sq + b.flat_offset,
                        view.initial + b.flat_offset};
    sums[i] = moves[t.dtype](const_cast<void*>(at(t.param, t.dtype, b.param_offset)),
                             at(t.grad, t.dtype, b.grad_offset), slices, b.length,
                             factors[b.tensor], unscale);
  });

  for (int64_t i = 0; i < count;) {
    const AdamWBlock& first = view.blocks[i];
    double change_abs = 0, dot = 0, change_dot = 0, grad_sq = 0;
    for (; i < count && view.blocks[i].segment == first.segment; ++i) {
      change_abs += sums[i].change_abs;
      dot += sums[i].change_dot_initial;
      change_dot += sums[i].change_dot_current;
      grad_sq += sums[i].grad_sq;
    }
    if (!view.tensors[first.tensor].grad) continue;
    float* out = view.scores + 4 * first.segment;
    out[0] = static_cast<float>(change_abs);
    out[1] = static_cast<float>(dot);
    out[2] = static_cast<float>(change_dot);
    out[3] = static_cast<float>(grad_sq);
  }
  return global_norm();
}

}  // namespace beft
