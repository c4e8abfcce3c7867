// bias_grad_stats on the CPU rung by rung, in the order in which docs/kernels.md climbs.
//
// Each rung computes the same of dY (batch, tokens, width), contiguous: the sum and the sum of
// squares, (width,) each, of the examples' gradients g_i = sum_t dY[i, t, :]. Built with the
// flags of the module itself. Least traffic: dY read once.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "bias_grad_stats.h"
#include "cpu/eights.h"
#include "cpu/parallel.h"

namespace {

using beft::Compensated;

struct Input {
  const void* data;  // (batch, tokens, width)
  int64_t dtype;     // as beft::DType
  int64_t batch, tokens, width, threads;
};

using Sums = void(const Input& x, float* grad, float* sum_sq);

template <typename T>
BEFT_INLINE const typename T::Raw* row(const Input& x, int64_t i, int64_t t) {
  return static_cast<const typename T::Raw*>(x.data) + (i * x.tokens + t) * x.width;
}

// columns: down each column, once for the sum and once more for the squares.
template <typename T>
BEFT_INLINE float column_sum(const Input& x, int64_t i, int64_t h) {
  float g = 0;
  for (int64_t t = 0; t < x.tokens; ++t) g += T::load(row<T>(x, i, t)[h]);
  return g;
}

template <typename T>
BEFT_INLINE void by_columns(const Input& x, float* grad, float* sum_sq) {
  for (int64_t h = 0; h < x.width; ++h) {
    grad[h] = 0;
    for (int64_t i = 0; i < x.batch; ++i) grad[h] += column_sum<T>(x, i, h);
  }
  for (int64_t h = 0; h < x.width; ++h) {
    sum_sq[h] = 0;
    for (int64_t i = 0; i < x.batch; ++i) {
      const float g = column_sum<T>(x, i, h);
      sum_sq[h] += g * g;
    }
  }
}

// rows: the inner loops change places, so that memory is read in its own order.
template <typename T, typename Sum>
BEFT_INLINE void sum_example(const Input& x, int64_t i, Sum* __restrict__ g) {
  std::fill_n(g, x.width, Sum(0));
  for (int64_t t = 0; t < x.tokens; ++t) {
    const auto* dy = row<T>(x, i, t);
    for (int64_t h = 0; h < x.width; ++h) g[h] += T::load(dy[h]);
  }
}

template <typename T>
BEFT_INLINE void by_rows(const Input& x, float* grad, float* sum_sq) {
  std::vector<float> g(x.width), total(x.width), squares(x.width);
  for (int64_t i = 0; i < x.batch; ++i) {
    sum_example<T>(x, i, g.data());
    for (int64_t h = 0; h < x.width; ++h) total[h] += g[h];
  }
  for (int64_t i = 0; i < x.batch; ++i) {
    sum_example<T>(x, i, g.data());
    for (int64_t h = 0; h < x.width; ++h) squares[h] += g[h] * g[h];
  }
  std::copy(total.begin(), total.end(), grad);
  std::copy(squares.begin(), squares.end(), sum_sq);
}

// one_pass: an example's gradient serves both results. doubles: sums in fp64. vectors: the same
// code once more for each width of vectors (BEFT_CLONES below).
template <typename T, typename Sum>
BEFT_INLINE void in_one_pass(const Input& x, float* grad, float* sum_sq) {
  std::vector<Sum> g(x.width), total(x.width), squares(x.width);
  for (int64_t i = 0; i < x.batch; ++i) {
    sum_example<T>(x, i, g.data());
    for (int64_t h = 0; h < x.width; ++h) {
      total[h] += g[h];
      squares[h] += g[h] * g[h];
    }
  }
  std::copy(total.begin(), total.end(), grad);
  std::copy(squares.begin(), squares.end(), sum_sq);
}

template <typename T>
BEFT_INLINE void in_floats(const Input& x, float* grad, float* sum_sq) {
  in_one_pass<T, float>(x, grad, sum_sq);
}

template <typename T>
BEFT_INLINE void in_doubles(const Input& x, float* grad, float* sum_sq) {
  in_one_pass<T, double>(x, grad, sum_sq);
}

// eight_rows: eight rows meet in registers before they touch an accumulator. Chunks of rows are
// summed in fp32, which is accurate for so few; what adds up chunks and examples is compensated.
constexpr int64_t CHUNK = 128;

template <typename T>
BEFT_INLINE void add_eight(const typename T::Raw* dy, int64_t width, int64_t n,
                           float* __restrict__ out) {
  for (int64_t h = 0; h < n; ++h) {
    float x[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) x[k] = T::load(dy[k * width + h]);
    out[h] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }
}

BEFT_INLINE void write(const std::vector<Compensated>& total,
                       const std::vector<Compensated>& squares, float* grad, float* sum_sq) {
  for (size_t h = 0; h < total.size(); ++h) {
    grad[h] = total[h].value();
    sum_sq[h] = squares[h].value();
  }
}

// The sums of one chunk; add(dy, width, out) adds eight whole rows.
template <typename T, typename Add>
BEFT_INLINE void sum_chunk(const Input& x, int64_t i, int64_t first, float* __restrict__ out,
                           const Add& add) {
  const int64_t last = std::min(first + CHUNK, x.tokens);
  std::fill_n(out, x.width, 0.0f);
  int64_t t = first;
  for (; t + 8 <= last; t += 8) add(row<T>(x, i, t), x.width, out);
  for (; t < last; ++t)
    for (int64_t h = 0; h < x.width; ++h) out[h] += T::load(row<T>(x, i, t)[h]);
}

template <typename T, typename Add>
BEFT_INLINE void in_chunks(const Input& x, float* grad, float* sum_sq, const Add& add) {
  std::vector<float> part(x.width);
  std::vector<Compensated> g(x.width), total(x.width), squares(x.width);
  for (int64_t i = 0; i < x.batch; ++i) {
    std::fill(g.begin(), g.end(), Compensated{});
    for (int64_t first = 0; first < x.tokens; first += CHUNK) {
      sum_chunk<T>(x, i, first, part.data(), add);
      for (int64_t h = 0; h < x.width; ++h) g[h].add(part[h]);
    }
    for (int64_t h = 0; h < x.width; ++h) beft::finish_example(g[h], 1.0f, total[h], squares[h]);
  }
  write(total, squares, grad, sum_sq);
}

template <typename T>
BEFT_INLINE void by_eight(const Input& x, float* grad, float* sum_sq) {
  in_chunks<T>(x, grad, sum_sq,
               [](const typename T::Raw* dy, int64_t width, float* out)
                   BEFT_INLINED { add_eight<T>(dy, width, width, out); });
}

// halves: fp16 by the processor's own conversion, where it has one; the others as before.
#ifdef BEFT_F16C
BEFT_F16C void add_eight_f16c(const uint16_t* dy, int64_t width, int64_t n, float* out) {
  int64_t h = 0;
  for (; h + 8 <= n; h += 8) {
    __m256 x[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) x[k] = beft::F16x8::load(dy + k * width + h);
    const __m256 sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    _mm256_storeu_ps(out + h, _mm256_loadu_ps(out + h) + sum);
  }
  add_eight<beft::F16>(dy + h, width, n - h, out + h);
}
#endif

template <typename T>
BEFT_INLINE void widen_eight(const typename T::Raw* dy, int64_t width, int64_t n, float* out) {
#ifdef BEFT_F16C
  if constexpr (std::is_same_v<T, beft::F16>)
    if (__builtin_cpu_supports("x86-64-v3")) return add_eight_f16c(dy, width, n, out);
#endif
  add_eight<T>(dy, width, n, out);
}

template <typename T>
BEFT_INLINE void by_halves(const Input& x, float* grad, float* sum_sq) {
  in_chunks<T>(x, grad, sum_sq,
               [](const typename T::Raw* dy, int64_t width, float* out)
                   BEFT_INLINED { widen_eight<T>(dy, width, width, out); });
}

// ahead: eight rows in tiles of columns; before each, the lines some way ahead are asked for.
constexpr int64_t TILE = 256;    // bytes of a row
constexpr int64_t AHEAD = 2048;  // bytes of a row

template <typename T>
BEFT_INLINE void add_tiles(const typename T::Raw* dy, int64_t width, float* out) {
  constexpr int64_t size = sizeof(typename T::Raw), tile = TILE / size, line = 64 / size;
  const int64_t ahead = std::min(AHEAD / size, width);
  for (int64_t h = 0; h < width; h += tile) {
    const int64_t next = h + ahead, n = std::min(tile, width - h);
    const auto* later = next < width ? dy + next : dy + 8 * width + (next - width);
    for (int k = 0; k < 8; ++k)
      for (int64_t j = 0; j < n; j += line) __builtin_prefetch(later + k * width + j, 0, 2);
    if (n == tile)  // a length that the compiler knows
      widen_eight<T>(dy + h, width, tile, out + h);
    else
      widen_eight<T>(dy + h, width, n, out + h);
  }
}

template <typename T>
BEFT_INLINE void by_tiles(const Input& x, float* grad, float* sum_sq) {
  in_chunks<T>(x, grad, sum_sq,
               [](const typename T::Raw* dy, int64_t width, float* out)
                   BEFT_INLINED { add_tiles<T>(dy, width, out); });
}

// threads: every example is one thread's; what adds them up goes by their order, not the threads'.
void by_threads(const Input& x, Sums* of_one, float* grad, float* sum_sq) {
  const int64_t size = x.dtype == static_cast<int64_t>(beft::DType::f32) ? 4 : 2;
  std::vector<float> grads(x.batch * x.width), squares(x.batch * x.width);
  beft::parallel(x.batch, static_cast<int>(x.threads), [&](int64_t i) {
    const char* data = static_cast<const char*>(x.data) + i * x.tokens * x.width * size;
    of_one({data, x.dtype, 1, x.tokens, x.width, 1}, &grads[i * x.width], &squares[i * x.width]);
  });
  std::vector<Compensated> total(x.width), total_sq(x.width);
  for (int64_t i = 0; i < x.batch; ++i)
    for (int64_t h = 0; h < x.width; ++h) {
      total[h].add(grads[i * x.width + h]);
      total_sq[h].add(squares[i * x.width + h]);
    }
  write(total, total_sq, grad, sum_sq);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define RUNG(NAME, HOW, CLONES)                                                             \
  namespace {                                                                               \
  CLONES void NAME##_f32(const Input& x, float* g, float* s) { HOW<beft::F32>(x, g, s); }   \
  CLONES void NAME##_bf16(const Input& x, float* g, float* s) { HOW<beft::BF16>(x, g, s); } \
  CLONES void NAME##_f16(const Input& x, float* g, float* s) { HOW<beft::F16>(x, g, s); }   \
  }                                                                                         \
  EXPORT void NAME(const Input& x, float* grad, float* sum_sq) {                            \
    Sums* const by_dtype[] = {NAME##_f32, NAME##_bf16, NAME##_f16};                         \
    by_dtype[x.dtype](x, grad, sum_sq);                                                     \
  }

RUNG(columns, by_columns, )
RUNG(rows, by_rows, )
RUNG(one_pass, in_floats, )
RUNG(doubles, in_doubles, )
RUNG(vectors, in_doubles, BEFT_CLONES)
RUNG(eight_rows, by_eight, BEFT_CLONES)
RUNG(halves, by_halves, BEFT_CLONES)
RUNG(ahead, by_tiles, BEFT_CLONES)
EXPORT void threads(const Input& x, float* grad, float* sum_sq) {
  by_threads(x, ahead, grad, sum_sq);
}
