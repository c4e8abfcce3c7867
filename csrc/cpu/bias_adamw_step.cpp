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
#include "cpu/eights.h"
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

// The same for 16-bit numbers, eight at a time.
#ifdef BEFT_F16C
template <typename T>
BEFT_F16C float norm_eights(const void* grad, int64_t n, float factor) {
  const auto* g = static_cast<const uint16_t*>(grad);
  __m256 sum{};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = T::load(g + i) * factor;
    sum += x * x;
  }
  return sum_of(sum) + block_norm<typename T::One>(g + i, n - i, factor);
}

template <typename T>
BEFT_F16C AdamWScores step_eights(void* param, const void* grad, const Slices& s, int64_t n,
                                  const AdamWFactors& factors, float unscale) {
  using One = typename T::One;
  const AdamWFactors f = factors;
  auto* p = static_cast<uint16_t*>(param);
  const auto* g = static_cast<const uint16_t*>(grad);
  float *exp_avg = s.exp_avg, *exp_avg_sq = s.exp_avg_sq, *master = s.master;
  const float* initial = s.initial;
  __m256 change_abs{}, dot{}, change_dot{}, grad_sq{};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    if (__builtin_expect(!T::follows(p + i, _mm256_loadu_ps(master + i)), false))
      for (int64_t k = i; k < i + 8; ++k)
        if (One::store(master[k]) != p[k]) master[k] = One::load(p[k]);
    const __m256 raw = T::load(g + i), b0 = _mm256_loadu_ps(initial + i);
    __m256 b = _mm256_loadu_ps(master + i);
    __m256 m = _mm256_loadu_ps(exp_avg + i), v = _mm256_loadu_ps(exp_avg_sq + i);
    adamw_moments(m, v, raw, f);
    adamw_move(b, m, _mm256_sqrt_ps(v), f);
    _mm256_storeu_ps(exp_avg + i, m);
    _mm256_storeu_ps(exp_avg_sq + i, v);
    _mm256_storeu_ps(master + i, b);
    T::store(p + i, b);
    const __m256 d = b - b0, x = raw * unscale;
    change_abs += _mm256_andnot_ps(_mm256_set1_ps(-0.0f), d);
    dot += d * b0;
    change_dot += d * b;
    grad_sq += x * x;
  }
  AdamWScores sums{sum_of(change_abs), sum_of(dot), sum_of(change_dot), sum_of(grad_sq)};
  if (i < n)
    sums += block_step<One>(p + i, g + i, {master + i, exp_avg + i, exp_avg_sq + i, initial + i},
                            n - i, factors, unscale);
  return sums;
}
#endif

struct Kernels {
  decltype(&norm_f32) norm;
  decltype(&step_f32) step;
};

Kernels kernels_of(DType dtype) {
  if (dtype == DType::f32) return {norm_f32, step_f32};
#ifdef BEFT_F16C
  if (__builtin_cpu_supports("x86-64-v3"))
    return dtype == DType::bf16 ? Kernels{norm_bf16, step_eights<BF16x8>}
                                : Kernels{norm_eights<F16x8>, step_eights<F16x8>};
#endif
  return dtype == DType::bf16 ? Kernels{norm_bf16, step_bf16} : Kernels{norm_f16, step_f16};
}

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
  const Kernels kernels[] = {kernels_of(DType::f32), kernels_of(DType::bf16),
                             kernels_of(DType::f16)};

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
        sums[i].grad_sq =
            kernels[t.dtype].norm(at(t.grad, t.dtype, b.grad_offset), b.length, unscale);
    });
    clip = clip_factor(global_norm(), view.max_grad_norm);
  }

  std::vector<AdamWFactors> factors(view.tensors.size());
  int64_t known = -1;  // a tensor whose factors are there; mostly they are the next one's too
  for (int64_t t = 0; t < static_cast<int64_t>(factors.size()); ++t) {
    if (!view.tensors[t].grad) continue;
    const int64_t group = view.tensors[t].group;
    view.steps[t] += 1;
    if (known >= 0 && view.tensors[known].group == group && view.steps[known] == view.steps[t])
      factors[t] = factors[known];
    else
      factors[t] = adamw_factors(view.groups[group], view.steps[t], clip * view.inverse_scale);
    known = t;
  }
  parallel(count, useful, [&](int64_t i) {
    const AdamWBlock& b = view.blocks[i];
    const AdamWTensor& t = view.tensors[b.tensor];
    if (!t.grad) return;
    const Slices slices{view.master ? view.master + b.flat_offset : nullptr,
                        view.exp_avg + b.flat_offset, view.exp_avg_sq + b.flat_offset,
                        view.initial + b.flat_offset};
    sums[i] = kernels[t.dtype].step(const_cast<void*>(at(t.param, t.dtype, b.param_offset)),
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
