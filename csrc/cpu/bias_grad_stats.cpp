// bias_grad_stats and bias_example_grads on the CPU: one read of grad_output.
//
// Stage 1: every example is cut into chunks of CHUNK rows; a chunk's rows are summed eight at a
// time as a tree into one fp32 row of the workspace (chunks, width), in the order of memory and
// with the lines ahead asked for. Chunks are dealt to threads.
// Stage 2: per column, chunks are added with compensation into the example's gradient g_i, always
// in the order of the rows. The statistics add g_i and g_i^2 to totals, example by example; the
// example gradients are written where they are asked for.
// The cut depends on the shape alone, so the result is the same for any number of threads.
// Least traffic: batch * tokens * width elements read once.
#include "bias_grad_stats.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/bias_grad_stats_cpu.h"
#include "cpu/parallel.h"
#ifdef BEFT_F16C
#include <immintrin.h>
#endif

namespace beft {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bf16 is read in pairs, low half first");

constexpr int64_t CHUNK = 128;                 // rows of one example summed by one task
constexpr int64_t STRIP = 4096;                // columns at a time: the accumulators stay in L1
constexpr int64_t TILE = 256;                  // bytes of eight rows each between two fetches
constexpr int64_t AHEAD = 2048;                // bytes of each row on their way from memory
constexpr int64_t COLUMNS = 128;               // finished together by one task of stage 2
constexpr int64_t BYTES_PER_THREAD = 1 << 19;  // less work than this does not pay for a thread

struct Chunk {
  int64_t example, first, last;  // rows [first, last) counted from the example's own start
  int64_t base;                  // element offset of the example's first row
};

// Eight rows, `st` apart, added as a tree to n sums; columns are `sh` apart.
template <typename T>
BEFT_INLINE void add_eight(const typename T::Raw* r, int64_t st, int64_t sh, int64_t n,
                           float* __restrict__ out) {
  for (int64_t h = 0; h < n; ++h) {
    const typename T::Raw* p = r + h * sh;
    float a = T::load(p[0]) + T::load(p[st]);
    float b = T::load(p[2 * st]) + T::load(p[3 * st]);
    float c = T::load(p[4 * st]) + T::load(p[5 * st]);
    float d = T::load(p[6 * st]) + T::load(p[7 * st]);
    out[h] += (a + b) + (c + d);
  }
}

// The same for bf16 read in pairs of columns: each half of a 32-bit word is a float after one
// operation, where widening 16-bit numbers takes two.
BEFT_INLINE void add_eight_pairs(const uint16_t* r, int64_t st, int64_t pairs,
                                 float* __restrict__ even, float* __restrict__ odd) {
  for (int64_t h = 0; h < pairs; ++h) {
    float x[8], y[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      uint32_t word;
      std::memcpy(&word, r + 2 * h + k * st, sizeof(word));
      x[k] = bits_as<float>(word << 16);
      y[k] = bits_as<float>(word & 0xffff0000u);
    }
    even[h] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    odd[h] += ((y[0] + y[1]) + (y[2] + y[3])) + ((y[4] + y[5]) + (y[6] + y[7]));
  }
}

// The same for fp16 by the processor's own conversion, where it has one.
#ifdef BEFT_F16C
BEFT_F16C void add_eight_f16c(const uint16_t* r, int64_t st, int64_t n, float* out) {
  int64_t h = 0;
  for (; h + 8 <= n; h += 8) {
    __m256 x[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
      x[k] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(r + h + k * st)));
    const __m256 sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    _mm256_storeu_ps(out + h, _mm256_loadu_ps(out + h) + sum);
  }
  add_eight<F16>(r + h, st, 1, n - h, out + h);
}
#endif

// Asks for n columns of eight rows from memory into the second-level cache. The processor's own
// prefetching alone keeps too few lines on their way where a core has other work to do as well.
template <typename Raw>
BEFT_INLINE void fetch(const Raw* r, int64_t st, int64_t n) {
  for (int k = 0; k < 8; ++k)
    for (int64_t byte = 0; byte < n * int64_t{sizeof(Raw)}; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(r + k * st) + byte, 0, 2);
}

// Calls add(rows, h, n) for tiles of eight whole rows and n columns from h on; returns how many
// rows were taken.
template <typename Raw, typename Add>
BEFT_INLINE int64_t by_eight(const Raw* data, int64_t rows, int64_t cols, int64_t st,
                             const Add& add) {
  constexpr int64_t tile = TILE / sizeof(Raw);
  const int64_t ahead = std::min<int64_t>(AHEAD / sizeof(Raw), cols);
  int64_t t = 0;
  for (; t + 8 <= rows; t += 8) {
    const Raw* r = data + t * st;
    for (int64_t h = 0; h < cols; h += tile) {
      const int64_t next = h + ahead;
      const Raw* later = next < cols ? r + next : r + 8 * st + (next - cols);
      const int64_t n = std::min(tile, cols - h);
      fetch(later, st, n);
      if (n == tile)  // a length that the compiler knows
        add(r + h, h, tile);
      else
        add(r + h, h, n);
    }
  }
  return t;
}

template <typename T>
BEFT_INLINE void add_rows(const typename T::Raw* data, int64_t first, int64_t last, int64_t cols,
                          int64_t st, int64_t sh, float* __restrict__ out) {
  for (int64_t t = first; t < last; ++t)
    for (int64_t h = 0; h < cols; ++h) out[h] += T::load(data[t * st + h * sh]);
}

// One strip of one chunk: rows are `st` apart, columns `sh` apart (1 in the fast call).
template <typename T>
BEFT_INLINE void sum_strip(const typename T::Raw* data, int64_t rows, int64_t cols, int64_t st,
                           int64_t sh, float* __restrict__ out) {
  using Raw = typename T::Raw;
  std::fill_n(out, cols, 0.0f);
  int64_t t = 0;
  if (sh == 1)
    t = by_eight(data, rows, cols, st, [&](const Raw* r, int64_t h, int64_t n) BEFT_INLINED {
      add_eight<T>(r, st, 1, n, out + h);
    });
  else
    for (; t + 8 <= rows; t += 8) add_eight<T>(data + t * st, st, sh, cols, out);
  add_rows<T>(data, t, rows, cols, st, sh, out);
}

BEFT_INLINE void sum_strip_pairs(const uint16_t* data, int64_t rows, int64_t cols, int64_t st,
                                 float* __restrict__ out) {
  const int64_t pairs = cols / 2;
  float even[STRIP / 2], odd[STRIP / 2];
  std::fill_n(even, pairs, 0.0f);
  std::fill_n(odd, pairs, 0.0f);
  const int64_t t = by_eight(data, rows, 2 * pairs, st,
                             [&](const uint16_t* r, int64_t h, int64_t n) BEFT_INLINED {
                               add_eight_pairs(r, st, n / 2, even + h / 2, odd + h / 2);
                             });
  for (int64_t h = 0; h < pairs; ++h) {
    out[2 * h] = even[h];
    out[2 * h + 1] = odd[h];
  }
  add_rows<BF16>(data, t, rows, 2 * pairs, st, 1, out);
  if (cols > 2 * pairs) sum_strip<BF16>(data + cols - 1, rows, 1, st, 1, out + cols - 1);
}

#ifdef BEFT_F16C
BEFT_INLINE void sum_strip_f16c(const uint16_t* data, int64_t rows, int64_t cols, int64_t st,
                                float* __restrict__ out) {
  std::fill_n(out, cols, 0.0f);
  const int64_t t = by_eight(data, rows, cols, st,
                             [&](const uint16_t* r, int64_t h, int64_t n)
                                 BEFT_INLINED { add_eight_f16c(r, st, n, out + h); });
  add_rows<F16>(data, t, rows, cols, st, 1, out);
}
#endif

// The strips of one chunk, by `fast` where the columns lie side by side.
template <typename T, typename Fast>
BEFT_INLINE void sum_chunk(const GradView& v, const Chunk& c, float* out, const Fast& fast) {
  const auto* data = static_cast<const typename T::Raw*>(v.data) + c.base + c.first * v.stride_t;
  for (int64_t h = 0; h < v.width; h += STRIP) {
    const int64_t cols = std::min(STRIP, v.width - h), rows = c.last - c.first;
    if (v.stride_h == 1)
      fast(data + h, rows, cols, v.stride_t, out + h);
    else
      sum_strip<T>(data + h * v.stride_h, rows, cols, v.stride_t, v.stride_h, out + h);
  }
}

BEFT_CLONES void sum_chunk_f32(const GradView& v, const Chunk& c, float* out) {
  sum_chunk<F32>(v, c, out,
                 [](const float* p, int64_t rows, int64_t cols, int64_t st, float* o)
                     BEFT_INLINED { sum_strip<F32>(p, rows, cols, st, 1, o); });
}
BEFT_CLONES void sum_chunk_bf16(const GradView& v, const Chunk& c, float* out) {
  sum_chunk<BF16>(v, c, out, sum_strip_pairs);
}
BEFT_CLONES void sum_chunk_f16(const GradView& v, const Chunk& c, float* out) {
  sum_chunk<F16>(v, c, out,
                 [](const uint16_t* p, int64_t rows, int64_t cols, int64_t st, float* o)
                     BEFT_INLINED { sum_strip<F16>(p, rows, cols, st, 1, o); });
}
#ifdef BEFT_F16C
BEFT_CLONES void sum_chunk_f16c(const GradView& v, const Chunk& c, float* out) {
  sum_chunk<F16>(v, c, out, sum_strip_f16c);
}
#endif

decltype(&sum_chunk_f32) chunk_summer(DType dtype) {
  if (dtype == DType::f32) return sum_chunk_f32;
  if (dtype == DType::bf16) return sum_chunk_bf16;
#ifdef BEFT_F16C
  if (__builtin_cpu_supports("x86-64-v3")) return sum_chunk_f16c;
#endif
  return sum_chunk_f16;
}

bool ascend(const int64_t* offsets, int64_t count, int64_t last) {
  return offsets[0] >= 0 && offsets[count - 1] <= last && std::is_sorted(offsets, offsets + count);
}

std::vector<Chunk> cut(const GradView& v) {
  std::vector<Chunk> chunks;
  // Else an expanded batch of any size would be walked through.
  if (v.tokens == 0 || v.width == 0) return chunks;
  for (int64_t i = 0; i < v.batch; ++i) {
    int64_t rows = v.offsets ? v.offsets[i + 1] - v.offsets[i] : v.tokens;
    int64_t base = v.offsets ? v.offsets[i] * v.stride_t : i * v.stride_b;
    for (int64_t t = 0; t < rows; t += CHUNK)
      chunks.push_back({i, t, std::min(rows, t + CHUNK), base});
  }
  return chunks;
}

// What stage 1 leaves: the sums of chunks, in the order of examples and rows.
struct Partial {
  std::vector<Chunk> chunks;
  std::unique_ptr<float[]> sums;  // (chunks, width)
  int64_t width = 0;

  int64_t count() const { return static_cast<int64_t>(chunks.size()); }
};

int useful(int threads, int64_t bytes) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + bytes / BYTES_PER_THREAD));
}

// Stage 1. False where the offsets do not ascend.
bool sum_chunks(const GradView& v, int threads, Partial& partial) {
  if (v.offsets && !ascend(v.offsets, v.batch + 1, v.tokens)) return false;
  partial.chunks = cut(v);
  partial.width = v.width;
  const int64_t count = partial.count();
  partial.sums.reset(new float[count * v.width]);
  const auto sum_rows = chunk_summer(v.dtype);
  int64_t rows = 0;
  for (const Chunk& c : partial.chunks) rows += c.last - c.first;
  const int64_t bytes = rows * v.width * (v.dtype == DType::f32 ? 4 : 2);
  parallel(count, useful(threads, bytes),
           [&](int64_t i) { sum_rows(v, partial.chunks[i], &partial.sums[i * v.width]); });
  return true;
}

// Adds the chunks of one example, from chunk i on, to its sums of cols columns; returns the first
// chunk of the next example.
BEFT_INLINE int64_t add_example(const Partial& p, int64_t i, int64_t first, int64_t cols,
                                Compensated* __restrict__ example) {
  const int64_t id = p.chunks[i].example;
  for (; i < p.count() && p.chunks[i].example == id; ++i) {
    const float* row = &p.sums[i * p.width + first];
    for (int64_t h = 0; h < cols; ++h) example[h].add(row[h]);
  }
  return i;
}

struct Totals {
  float scale;
  float *grad, *sum, *sum_sq;  // (width,)
};

// Stage 2 of the statistics, columns [first, first + COLUMNS).
BEFT_CLONES void finish_columns(const Partial& p, const Totals& out, int64_t first) {
  const int64_t cols = std::min(COLUMNS, p.width - first);
  Compensated total[COLUMNS], squares[COLUMNS];
  for (int64_t i = 0; i < p.count();) {
    Compensated example[COLUMNS];
    i = add_example(p, i, first, cols, example);
    for (int64_t h = 0; h < cols; ++h) finish_example(example[h], out.scale, total[h], squares[h]);
  }
  for (int64_t h = 0; h < cols; ++h)
    finish_column(total[h], squares[h], out.scale, out.grad[first + h], out.sum[first + h],
                  out.sum_sq[first + h]);
}

template <typename T>
BEFT_INLINE void store_row(const Compensated* example, int64_t cols, float scale, void* row,
                           int64_t at) {
  auto* out = static_cast<typename T::Raw*>(row) + at;
  for (int64_t h = 0; h < cols; ++h) out[h] = T::store(scaled_example(example[h], scale));
}

// Stage 2 of the example gradients: one example, columns [first, first + COLUMNS).
BEFT_CLONES void finish_row(const Partial& p, const RowsView& out, float scale, int64_t id,
                            int64_t first) {
  const int64_t cols = std::min(COLUMNS, p.width - first), at = id * out.stride + first;
  Compensated example[COLUMNS];
  const auto chunk = std::partition_point(p.chunks.begin(), p.chunks.end(),
                                          [id](const Chunk& c) { return c.example < id; });
  if (chunk != p.chunks.end() && chunk->example == id)
    add_example(p, chunk - p.chunks.begin(), first, cols, example);
  if (out.dtype == DType::bf16)
    store_row<BF16>(example, cols, scale, out.data, at);
  else
    store_row<F32>(example, cols, scale, out.data, at);
}

}  // namespace

bool bias_grad_stats_cpu(const GradView& v, float scale, int threads, float* grad, float* sum,
                         float* sum_sq) {
  Partial partial;
  if (!sum_chunks(v, threads, partial)) return false;
  const Totals out{scale, grad, sum, sum_sq};
  const int64_t strips = (v.width + COLUMNS - 1) / COLUMNS;
  const int64_t bytes = partial.count() * v.width * int64_t{sizeof(float)};
  parallel(strips, useful(threads, bytes),
           [&](int64_t strip) { finish_columns(partial, out, strip * COLUMNS); });
  return true;
}

bool bias_example_grads_cpu(const GradView& v, float scale, int threads, const RowsView& out) {
  Partial partial;
  if (!sum_chunks(v, threads, partial)) return false;
  const int64_t strips = (v.width + COLUMNS - 1) / COLUMNS;
  const int64_t bytes = (partial.count() + v.batch) * v.width * int64_t{sizeof(float)};
  parallel(v.batch * strips, useful(threads, bytes), [&](int64_t task) {
    finish_row(partial, out, scale, task / strips, task % strips * COLUMNS);
  });
  return true;
}

}  // namespace beft
