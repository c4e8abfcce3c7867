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
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/bias_grad_stats_cpu.h"

// The widest vectors of the machine at hand are chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define BEFT_CLONES __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define BEFT_CLONES
#endif
#define BEFT_INLINE inline __attribute__((always_inline))

namespace beft {
namespace {

constexpr int64_t CHUNK = 128;                 // rows of one example summed by one task
constexpr int64_t STRIP = 1024;                // columns at a time: the accumulators stay in L1
constexpr int64_t BYTES_PER_THREAD = 1 << 19;  // less work than this does not pay for a thread

struct Chunk {
  int64_t example, first, last;  // rows [first, last) counted from the example's own start
  int64_t base;                  // element offset of the example's first row
};

struct F32 {
  using Raw = float;
  static BEFT_INLINE float load(Raw x) { return x; }
};
struct BF16 {
  using Raw = uint16_t;
  static BEFT_INLINE float load(Raw x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
  }
};
struct F16 {
  using Raw = uint16_t;
  // Exact for every half, subnormals included: the exponent is rebased by a float multiply.
  static BEFT_INLINE float load(Raw x) {
    uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
    uint32_t body = static_cast<uint32_t>(x & 0x7fffu) << 13;
    uint32_t special = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
    float scaled;
    std::memcpy(&scaled, &body, sizeof(scaled));
    scaled *= 5.192296858534828e+33f;  // 2^112
    uint32_t bits;
    std::memcpy(&bits, &scaled, sizeof(bits));
    bits |= sign | special;
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
  }
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

// Runs work(i) for i in [0, n), dealt in contiguous runs. Threads are made per call: cheap beside
// the work that warrants them, and safe in a forked data loader, where a pool would hang.
template <typename Work>
void parallel(int64_t n, int threads, Work work) {
  int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n));
  auto run = [&](int64_t part) {
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) work(i);
  };
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part) others.emplace_back(run, part);
  run(0);
  for (auto& thread : others) thread.join();
}

}  // namespace

void bias_grad_stats_cpu(const GradView& v, float scale, int threads, float* grad, float* sum,
                         float* sum_sq) {
  const std::vector<Chunk> chunks = cut(v);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<float> partial(count * v.width);
  auto sum_rows = v.dtype == DType::f32    ? sum_chunk_f32
                  : v.dtype == DType::bf16 ? sum_chunk_bf16
                                           : sum_chunk_f16;
  const int64_t bytes = count * CHUNK * v.width * (v.dtype == DType::f32 ? 4 : 2);
  const int useful = static_cast<int>(std::min<int64_t>(threads, 1 + bytes / BYTES_PER_THREAD));
  parallel(count, useful, [&](int64_t i) { sum_rows(v, chunks[i], &partial[i * v.width]); });

  const int64_t strips = (v.width + STRIP - 1) / STRIP;
  const int64_t work = count * v.width * static_cast<int64_t>(sizeof(float));
  const int wide = static_cast<int>(std::min<int64_t>(threads, 1 + work / BYTES_PER_THREAD));
  parallel(strips, wide, [&](int64_t strip) {
    for (int64_t h = strip * STRIP; h < std::min(v.width, (strip + 1) * STRIP); ++h) {
      Compensated total, squares;
      for (int64_t i = 0; i < count;) {
        Compensated example;
        const int64_t id = chunks[i].example;
        for (; i < count && chunks[i].example == id; ++i) example.add(partial[i * v.width + h]);
        finish_example(example, scale, total, squares);
      }
      finish_column(total, squares, scale, grad[h], sum[h], sum_sq[h]);
    }
  });
}

}  // namespace beft
