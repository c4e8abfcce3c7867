// Arithmetic of the bias-gradient statistics, shared by the CPU and the GPU code. No torch.
//
// Every sum over rows is a compensated one: `sum` is the fp32 running sum, `error` the sum of
// the rounding errors that TwoSum recovers exactly. Build without -ffast-math.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BEFT_HD __host__ __device__ __forceinline__
#else
#define BEFT_HD inline
#endif

namespace beft {

// Rounded product that no compiler fuses into the addition that uses it: a fused one would
// break TwoSum's exactness and make the CPU and the GPU round differently.
BEFT_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#elif defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(__CUDACC__)
  return __builtin_assoc_barrier(a * b);
#else
  return a * b;
#endif
}

// Knuth's TwoSum: sum + error grows by exactly x, up to the rounding of `error` itself.
// Free-standing, so that loops over separate arrays of sums and errors vectorise.
BEFT_HD void two_sum(float& sum, float& error, float x) {
  const float total = sum + x;
  const float taken = total - sum;
  error += (sum - (total - taken)) + (x - taken);
  sum = total;
}

struct Compensated {
  float sum = 0.0f;
  float error = 0.0f;

  BEFT_HD void add(float x) { two_sum(sum, error, x); }

  BEFT_HD void merge(Compensated other) {
    two_sum(sum, error, other.sum);
    error += other.error;
  }

  // After an overflow or an infinite input `error` is NaN while `sum` still says what happened.
  BEFT_HD float value() const { return error == error ? sum + error : sum; }
};

// Ends one example: its gradient g_i, times scale.
BEFT_HD float scaled_example(Compensated example, float scale) {
  return rounded_product(scale, example.value());
}

// The same for the statistics: g_i enters the gradient, (scale * g_i)^2 the sum of squares.
BEFT_HD void finish_example(Compensated example, float scale, Compensated& grad,
                            Compensated& squares) {
  const float scaled = scaled_example(example, scale);
  grad.merge(example);
  squares.add(rounded_product(scaled, scaled));
}

// Ends one column: writes grad, adds to the two running statistics in place.
BEFT_HD void finish_column(Compensated grad, Compensated squares, float scale, float& grad_out,
                           float& sum, float& sum_sq) {
  grad_out = grad.value();
  sum += rounded_product(scale, grad_out);
  sum_sq += squares.value();
}

struct Rows {
  int64_t begin, end;
};

// Rows of chunk `chunk` of an example that occupies [begin, end). May be empty.
BEFT_HD Rows chunk_rows(int64_t begin, int64_t end, int64_t chunks, int64_t chunk) {
  const int64_t length = (end - begin + chunks - 1) / chunks;
  const int64_t first = begin + chunk * length;
  const int64_t last = first + length;
  return {first < end ? first : end, last < end ? last : end};
}

}  // namespace beft
