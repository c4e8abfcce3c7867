// bias_grad_stats on the CPU: one read of grad_output.
//
// Stage 1: every example is cut into chunks of CHUNK rows; a chunk's rows are summed eight at a
// time as a tree into one fp32 row of the workspace (chunks, width). Chunks are dealt to threads.
// Stage 2: per column, chunks are added with compensation into the example's gradient g_i, and
// g_i and g_i^2 into the totals, always in the order of the rows.
// The cut depends on the shape alone, so the result is the same for any number of threads.
// Least traffic: batch * tokens * width elements read once.
#include "bias_grad_stats.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/bias_grad_stats_cpu.h"
#include "cpu/parallel.h"

namespace beft {
namespace {

constexpr int64_t CHUNK = 128;                 // rows of one example summed by one task
constexpr int64_t STRIP = 4096;                // columns at a time: the accumulators stay in L1
constexpr int64_t COLUMNS = 128;               // finished together by one task of stage 2
constexpr int64_t BYTES_PER_THREAD = 1 << 19;  // less work than this does not pay for a thread

struct Chunk {
  int64_t example, first, last;  // rows [first, last) counted from the example's own start
  int64_t base;                  // element offset of the example's first row
};

// One strip of one chunk: rows are `st` apart, columns `sh` apart (1 in the fast call).
template <typename T>
BEFT_INLINE void sum_strip(const typename T::Raw* data, int64_t rows, int64_t cols, int64_t st,
                           int64_t sh, float* __restrict__ out) {
  for (int64_t h = 0; h < cols; ++h) out[h] = 0.0f;
  int64_t t = 0;
  for (; t + 8 <= rows; t += 8) {
    const typename T::Raw* r = data + t * st;
    for (int64_t h = 0; h < cols; ++h) {
      const typename T::Raw* p = r + h * sh;
      float a = T::load(p[0]) + T::load(p[st]);
      float b = T::load(p[2 * st]) + T::load(p[3 * st]);
      float c = T::load(p[4 * st]) + T::load(p[5 * st]);
      float d = T::load(p[6 * st]) + T::load(p[7 * st]);
      out[h] += (a + b) + (c + d);
    }
  }
  for (; t < rows; ++t)
    for (int64_t h = 0; h < cols; ++h) out[h] += T::load(data[t * st + h * sh]);
}

template <typename T>
BEFT_INLINE void sum_chunk(const GradView& v, const Chunk& c, float* out) {
  const auto* data = static_cast<const typename T::Raw*>(v.data) + c.base + c.first * v.stride_t;
  for (int64_t h = 0; h < v.width; h += STRIP) {
    int64_t cols = std::min(STRIP, v.width - h);
    if (v.stride_h == 1)
      sum_strip<T>(data + h, c.last - c.first, cols, v.stride_t, 1, out + h);
    else
      sum_strip<T>(data + h * v.stride_h, c.last - c.first, cols, v.stride_t, v.stride_h, out + h);
  }
}

BEFT_CLONES void sum_chunk_f32(const GradView& v, const Chunk& c, float* out) {
  sum_chunk<F32>(v, c, out);
}
BEFT_CLONES void sum_chunk_bf16(const GradView& v, const Chunk& c, float* out) {
  sum_chunk<BF16>(v, c, out);
}
BEFT_CLONES void sum_chunk_f16(const GradView& v, const Chunk& c, float* out) {
  sum_chunk<F16>(v, c, out);
}

std::vector<Chunk> cut(const GradView& v) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < v.batch; ++i) {
    int64_t rows = v.offsets ? v.offsets[i + 1] - v.offsets[i] : v.tokens;
    int64_t base = v.offsets ? v.offsets[i] * v.stride_t : i * v.stride_b;
    for (int64_t t = 0; t < rows; t += CHUNK)
      chunks.push_back({i, t, std::min(rows, t + CHUNK), base});
  }
  return chunks;
}

struct Sums {
  const float* partial;  // (count, width)
  const Chunk* chunks;   // (count,)
  int64_t count, width;
  float scale;
  float *grad, *sum, *sum_sq;  // (width,)
};

// Stage 2 of the columns [first, first + COLUMNS).
BEFT_CLONES void finish_columns(const Sums& s, int64_t first) {
  const int64_t cols = std::min(COLUMNS, s.width - first);
  Compensated total[COLUMNS], squares[COLUMNS];
  for (int64_t i = 0; i < s.count;) {
    Compensated example[COLUMNS];
    const int64_t id = s.chunks[i].example;
    for (; i < s.count && s.chunks[i].example == id; ++i) {
      const float* row = s.partial + i * s.width + first;
      for (int64_t h = 0; h < cols; ++h) example[h].add(row[h]);
    }
    for (int64_t h = 0; h < cols; ++h) finish_example(example[h], s.scale, total[h], squares[h]);
  }
  for (int64_t h = 0; h < cols; ++h)
    finish_column(total[h], squares[h], s.scale, s.grad[first + h], s.sum[first + h],
                  s.sum_sq[first + h]);
}

}  // namespace

void bias_grad_stats_cpu(const GradView& v, float scale, int threads, float* grad, float* sum,
                         float* sum_sq) {
  const std::vector<Chunk> chunks = cut(v);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const std::unique_ptr<float[]> partial(new float[count * v.width]);
  auto sum_rows = v.dtype == DType::f32    ? sum_chunk_f32
                  : v.dtype == DType::bf16 ? sum_chunk_bf16
                                           : sum_chunk_f16;
  const int64_t bytes = count * CHUNK * v.width * (v.dtype == DType::f32 ? 4 : 2);
  const int useful = static_cast<int>(std::min<int64_t>(threads, 1 + bytes / BYTES_PER_THREAD));
  parallel(count, useful, [&](int64_t i) { sum_rows(v, chunks[i], &partial[i * v.width]); });

  const Sums sums{partial.get(), chunks.data(), count, v.width, scale, grad, sum, sum_sq};
  const int64_t strips = (v.width + COLUMNS - 1) / COLUMNS;
  const int64_t work = count * v.width * static_cast<int64_t>(sizeof(float));
  const int wide = static_cast<int>(std::min<int64_t>(threads, 1 + work / BYTES_PER_THREAD));
  parallel(strips, wide, [&](int64_t strip) { finish_columns(sums, strip * COLUMNS); });
}

}  // namespace beft
