// Per-example bias gradients g_i[h] = sum_t dY[i,t,h], and what two operators make of them:
// bias_grad_stats grad = sum_i g_i, and in place sum += scale * grad, sum_sq += sum_i (scale *
// g_i)^2; bias_example_grads the rows scale * g_i.
//
// Stage 1, grid (strips * B, chunks): a block reads one chunk of rows of one example over one
// strip of columns and writes one row of `partial`. Stage 2 of the statistics, grid
// (ceil(H / 32)): a block reads `partial` for 32 columns and writes grad, sum and sum_sq there.
// Stage 2 of the rows, grid (ceil(H / 32) * ceil(B / 8)): for 32 columns of 8 examples.
// Deterministic: no atomics; which thread adds which row, and the tree that merges threads,
// follow from (B, chunks, T, H) alone. Vector and scalar loads add in the same order, bit for bit.
// Moves at least B*T*H*itemsize bytes and 20*H, or the rows, plus 16*B*chunks*H for `partial`.

#include <cuda_runtime.h>

#include <cstring>

#include "../bias_grad_stats.h"
#include "convert.cuh"

namespace {

using beft::Compensated;
using beft_cuda::to_float;

constexpr int kLanes = 32;  // threads across columns, threadIdx.x
constexpr int kGroups = 8;  // threads across rows (stage 1) or examples (stage 2), threadIdx.y
constexpr int kUnroll = 4;  // rows in flight per thread
// Blocks of partial_sums on a multiprocessor: the 1024 threads that the smallest one holds. Told
// nothing, ptxas spills on some targets to fit more.
constexpr int kResident = 4;

// kVec values from `from` as floats; one 16-byte load where kVec > 1.
template <typename T, int kVec>
__device__ __forceinline__ void load(const T* from, float (&to)[kVec]) {
  if constexpr (kVec == 1) {
    to[0] = to_float(*from);
  } else {
    static_assert(sizeof(T) * kVec == sizeof(uint4), "a vector load is 16 bytes");
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    T values[kVec];
    memcpy(values, &raw, sizeof(raw));
#pragma unroll
    for (int v = 0; v < kVec; ++v) to[v] = to_float(values[v]);
  }
}

__device__ __forceinline__ int64_t within(int64_t row, int64_t rows) {
  return row < 0 ? 0 : row > rows ? rows : row;
}

// Merges the kGroups threads of each column as a binary tree; the result is in threadIdx.y == 0.
template <int kVec>
__device__ __forceinline__ void merge_groups(Compensated (&mine)[kVec]) {
  __shared__ float2 slots[kGroups / 2][kVec][kLanes];
  const int lane = threadIdx.x, group = threadIdx.y;
#pragma unroll
  for (int half = kGroups / 2; half > 0; half /= 2) {
    if (group >= half && group < 2 * half) {
#pragma unroll
      for (int v = 0; v < kVec; ++v)
        slots[group - half][v][lane] = make_float2(mine[v].sum, mine[v].error);
    }
    __syncthreads();
    if (group < half) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const float2 other = slots[group][v][lane];
        mine[v].merge(Compensated{other.x, other.y});
      }
    }
    __syncthreads();
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kLanes* kGroups, kResident)
    partial_sums(const T* __restrict__ grad_output,            // (B, T, H) or (N, H), strided
                 const int64_t* __restrict__ example_offsets,  // (B + 1,) or null
                 int64_t strips, int64_t tokens, int64_t width, int64_t stride_b, int64_t stride_t,
                 int64_t stride_h,
                 float2* __restrict__ partial) {  // (B, chunks, H) of {sum, error}
  const int64_t example = blockIdx.x / strips;
  const int64_t strip = blockIdx.x % strips;
  const int64_t column = (strip * kLanes + threadIdx.x) * kVec;
  const bool inside = column < width;

  const bool packed = example_offsets != nullptr;
  // The host does not wait to read the offsets, so wrong ones are clamped here, not refused.
  const int64_t first = packed ? within(example_offsets[example], tokens) : 0;
  const int64_t last = packed ? within(example_offsets[example + 1], tokens) : tokens;
  const beft::Rows rows = beft::chunk_rows(first, last, gridDim.y, blockIdx.y);

  Compensated mine[kVec];
  if (inside) {
    const T* base = grad_output + (packed ? 0 : example * stride_b) + column * stride_h;
    int64_t row = rows.begin + threadIdx.y;
    for (; row + (kUnroll - 1) * kGroups < rows.end; row += kUnroll * kGroups) {
      float x[kUnroll][kVec];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) load<T, kVec>(base + (row + u * kGroups) * stride_t, x[u]);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        // Two 16-bit values add in fp32 almost always exactly: pairing them halves the
        // instructions of TwoSum, which would otherwise rival the memory on an A100.
#pragma unroll
        for (int u = 0; u < kUnroll; u += 2) {
          if constexpr (sizeof(T) == 2) {
            mine[v].add(x[u][v] + x[u + 1][v]);
          } else {
            mine[v].add(x[u][v]);
            mine[v].add(x[u + 1][v]);
          }
        }
      }
    }
    for (; row < rows.end; row += kGroups) {
      float x[kVec];
      load<T, kVec>(base + row * stride_t, x);
#pragma unroll
      for (int v = 0; v < kVec; ++v) mine[v].add(x[v]);
    }
  }

  merge_groups<kVec>(mine);
  if (inside && threadIdx.y == 0) {
    float2* out = partial + (example * gridDim.y + blockIdx.y) * width + column;
#pragma unroll
    for (int v = 0; v < kVec; ++v) out[v] = make_float2(mine[v].sum, mine[v].error);
  }
}

// One example's sum of one column.
__device__ __forceinline__ Compensated
merged_chunks(const float2* __restrict__ partial,  // (B, chunks, H) of {sum, error}
              int64_t example, int64_t column, int64_t chunks, int64_t width) {
  const float2* from = partial + example * chunks * width + column;
  Compensated sum;
#pragma unroll 4
  for (int64_t c = 0; c < chunks; ++c) {
    const float2 part = from[c * width];
    sum.merge(Compensated{part.x, part.y});
  }
  return sum;
}

__global__ void __launch_bounds__(kLanes* kGroups)
    finish_columns(const float2* __restrict__ partial,  // (B, chunks, H) of {sum, error}
                   int64_t batch, int64_t chunks, int64_t width, float scale,
                   float* __restrict__ grad,      // (H,)
                   float* __restrict__ sum,       // (H,)
                   float* __restrict__ sum_sq) {  // (H,)
  const int64_t column = int64_t{blockIdx.x} * kLanes + threadIdx.x;
  Compensated totals[2];  // of g_i, and of (scale * g_i)^2
  if (column < width) {
    const beft::Rows examples = beft::chunk_rows(0, batch, kGroups, threadIdx.y);
    for (int64_t i = examples.begin; i < examples.end; ++i)
      beft::finish_example(merged_chunks(partial, i, column, chunks, width), scale, totals[0],
                           totals[1]);
  }
  merge_groups<2>(totals);
  if (column < width && threadIdx.y == 0)
    beft::finish_column(totals[0], totals[1], scale, grad[column], sum[column], sum_sq[column]);
}

template <typename T>
__global__ void __launch_bounds__(kLanes* kGroups)
    finish_rows(const float2* __restrict__ partial,  // (B, chunks, H) of {sum, error}
                int64_t batch, int64_t chunks, int64_t width, int64_t strips, float scale,
                T* __restrict__ out,  // (B, H), rows `stride` elements apart
                int64_t stride) {
  const int64_t example = blockIdx.x / strips * kGroups + threadIdx.y;
  const int64_t column = blockIdx.x % strips * kLanes + threadIdx.x;
  if (example >= batch || column >= width) return;
  const Compensated sum = merged_chunks(partial, example, column, chunks, width);
  beft_cuda::store(out + example * stride + column, beft::scaled_example(sum, scale));
}

struct Shape {
  int64_t batch, tokens, width, stride_b, stride_t, stride_h;
};

int64_t strips_of(int64_t width) { return (width + kLanes - 1) / kLanes; }

template <typename T, int kVec>
void launch_partial_sums(const void* grad_output, const Shape& s, const int64_t* example_offsets,
                         int64_t chunks, float* workspace, cudaStream_t stream) {
  const int64_t strips = (s.width + kLanes * kVec - 1) / (kLanes * kVec);
  const dim3 grid(static_cast<unsigned>(strips * s.batch), static_cast<unsigned>(chunks));
  const dim3 block(kLanes, kGroups);
  partial_sums<T, kVec><<<grid, block, 0, stream>>>(
      static_cast<const T*>(grad_output), example_offsets, strips, s.tokens, s.width, s.stride_b,
      s.stride_t, s.stride_h, reinterpret_cast<float2*>(workspace));
}

template <typename T>
void partial_sums_of(const void* grad_output, const Shape& s, const int64_t* example_offsets,
                     int64_t chunks, float* workspace, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const bool one_example = s.batch == 1 || example_offsets != nullptr;
  const bool aligned = reinterpret_cast<uintptr_t>(grad_output) % 16 == 0 && s.stride_h == 1 &&
                       s.width % kVec == 0 && (s.tokens <= 1 || s.stride_t % kVec == 0) &&
                       (one_example || s.stride_b % kVec == 0);
  auto launch = aligned ? launch_partial_sums<T, kVec> : launch_partial_sums<T, 1>;
  launch(grad_output, s, example_offsets, chunks, workspace, stream);
}

// Stage 1 for both operators.
cudaError_t fill_partial(const void* grad_output, int dtype, const Shape& s,
                         const int64_t* example_offsets, int64_t chunks, float* workspace,
                         cudaStream_t stream) {
  if (s.batch < 0 || s.tokens < 0 || s.width < 0 || dtype < 0 || dtype > 2 || chunks < 1)
    return cudaErrorInvalidValue;
  if (strips_of(s.width) > INT32_MAX / (s.batch > 0 ? s.batch : 1))
    return cudaErrorInvalidValue;  // more blocks than a grid holds
  if (s.width == 0 || s.batch == 0) return cudaSuccess;

  using Launch = void (*)(const void*, const Shape&, const int64_t*, int64_t, float*, cudaStream_t);
  constexpr Launch by_dtype[] = {partial_sums_of<float>, partial_sums_of<__nv_bfloat16>,
                                 partial_sums_of<__half>};
  by_dtype[dtype](grad_output, s, example_offsets, chunks, workspace, stream);
  return cudaGetLastError();
}

template <typename T>
void launch_finish_rows(const float* workspace, const Shape& s, int64_t chunks, float scale,
                        void* out, int64_t stride, cudaStream_t stream) {
  const int64_t strips = strips_of(s.width);
  const dim3 grid(static_cast<unsigned>(strips * ((s.batch + kGroups - 1) / kGroups)));
  const dim3 block(kLanes, kGroups);
  finish_rows<T><<<grid, block, 0, stream>>>(reinterpret_cast<const float2*>(workspace), s.batch,
                                             chunks, s.width, strips, scale, static_cast<T*>(out),
                                             stride);
}

}  // namespace

// Loads these kernels onto the current device, where one runs there.
cudaError_t beft_bias_grad_stats_ready() {
  cudaFuncAttributes unused;
  return cudaFuncGetAttributes(&unused, reinterpret_cast<const void*>(&finish_columns));
}

// Packed input (example_offsets not null): batch is the number of examples, tokens is N,
// stride_b is ignored. Strides count elements. Asynchronous on `stream`.
cudaError_t beft_bias_grad_stats_cuda(
    const void* grad_output,  // (B, T, H) or (N, H), strided
    int dtype,                // 0 fp32, 1 bf16, 2 fp16
    int64_t batch, int64_t tokens, int64_t width, int64_t stride_b, int64_t stride_t,
    int64_t stride_h,
    const int64_t* example_offsets,  // (B + 1,) on the device, or null
    int64_t chunks,                  // of rows, into which each example is cut
    float scale,
    float* workspace,  // (2, B, chunks, H), 8-byte aligned
    float* grad,       // (H,), written
    float* sum,        // (H,), added to
    float* sum_sq,     // (H,), added to
    cudaStream_t stream) {
  const cudaError_t status =
      fill_partial(grad_output, dtype, {batch, tokens, width, stride_b, stride_t, stride_h},
                   example_offsets, chunks, workspace, stream);
  if (status != cudaSuccess || width == 0) return status;
  const dim3 grid(static_cast<unsigned>(strips_of(width)));
  const dim3 block(kLanes, kGroups);
  finish_columns<<<grid, block, 0, stream>>>(reinterpret_cast<const float2*>(workspace), batch,
                                             chunks, width, scale, grad, sum, sum_sq);
  return cudaGetLastError();
}

// As above, but for what is written.
cudaError_t beft_bias_example_grads_cuda(const void* grad_output, int dtype, int64_t batch,
                                         int64_t tokens, int64_t width, int64_t stride_b,
                                         int64_t stride_t, int64_t stride_h,
                                         const int64_t* example_offsets, int64_t chunks,
                                         float scale, float* workspace,
                                         void* out,           // (B, H), written
                                         int out_dtype,       // 0 fp32, 1 bf16
                                         int64_t out_stride,  // elements from one row to the next
                                         cudaStream_t stream) {
  if (out_dtype < 0 || out_dtype > 1) return cudaErrorInvalidValue;
  const Shape shape{batch, tokens, width, stride_b, stride_t, stride_h};
  const cudaError_t status =
      fill_partial(grad_output, dtype, shape, example_offsets, chunks, workspace, stream);
  if (status != cudaSuccess || width == 0 || batch == 0) return status;
  auto launch = out_dtype == 0 ? launch_finish_rows<float> : launch_finish_rows<__nv_bfloat16>;
  launch(workspace, shape, chunks, scale, out, out_stride, stream);
  return cudaGetLastError();
}
