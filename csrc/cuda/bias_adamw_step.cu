// One AdamW step over all biases of a device, with each segment's scores from the same pass.
//
// Grid (block_count): a block moves the elements of one entry of the table `blocks` and writes
// their four sums to its own slot. The last block of a segment to arrive (an integer counter
// tells) adds the segment's slots, the last of all adds the norm and counts the step. With
// clipping a launch of the same grid that only reads the gradients goes before.
// Deterministic: who comes last is chance, the order of additions is not; no float atomics.
// Moves at least 5 reads and 3 writes of 4 bytes an element; with clipping one read more.
// Addresses of parameters and gradients are kernel arguments, so nothing is copied to the device
// before a step and a CUDA graph holds them.

#include <cmath>

#include "bias_adamw_step_cuda.h"
#include "convert.cuh"

namespace {

using beft::AdamWBlock;
using beft::AdamWFactors;
using beft::AdamWGroup;
using beft::AdamWTensor;
using beft_cuda::AdamWTables;

constexpr int kThreads = 256;
constexpr int kFewTensors = 96;  // below 4 KB of arguments launches are cheapest
constexpr int kSomeTensors = 256;

// Tensors field by field and in few bytes: a launch carries little.
template <int kTensors>
struct Arguments {
  AdamWTables tables;
  AdamWGroup groups[beft_cuda::kMaxGroups];
  void* params[kTensors];
  const void* grads[kTensors];
  uint32_t param_sizes[kTensors], grad_sizes[kTensors];
  uint16_t dtypes[kTensors], group_of[kTensors];

  __device__ __forceinline__ AdamWTensor tensor(int i) const {
    return {params[i], grads[i], dtypes[i], group_of[i], param_sizes[i], grad_sizes[i]};
  }
  // The table lies in memory that anyone may have written: what it names is brought inside.
  __device__ __forceinline__ AdamWBlock block() const {
    AdamWBlock found = tables.blocks[blockIdx.x];
    found.tensor = beft::within(found.tensor, 0, tables.tensors - 1);
    found.segment = beft::within(found.segment, 0, tables.segments - 1);
    return beft::inside(found, param_sizes[found.tensor], grad_sizes[found.tensor],
                        tables.elements);
  }
};
static_assert(sizeof(Arguments<beft_cuda::kMaxTensors>) <= 32764, "what a launch may carry");
static_assert(sizeof(Arguments<kFewTensors>) <= 4096, "what every launch may carry");

__device__ __forceinline__ float4 plus(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Sum over the threads of a block as a binary tree; every thread gets it.
__device__ __forceinline__ float4 block_sum(float4 mine) {
  __shared__ float4 slots[kThreads];
  slots[threadIdx.x] = mine;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half)
      slots[threadIdx.x] = plus(slots[threadIdx.x], slots[threadIdx.x + half]);
    __syncthreads();
  }
  const float4 total = slots[0];
  __syncthreads();
  return total;
}

// Sum of the slots [first, last) that other blocks have written.
__device__ __forceinline__ float4 sum_slots(const float4* sums, int64_t first, int64_t last) {
  float4 mine = make_float4(0, 0, 0, 0);
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads)
    mine = plus(mine, __ldcg(sums + i));
  return block_sum(mine);
}

// True in the last of `blocks` blocks to get here; it sees what the others wrote, and sets the
// counter back for the next launch.
__device__ __forceinline__ bool is_last(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == blocks - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  const bool found = last;
  __syncthreads();
  return found;
}

__device__ __forceinline__ float unscale(const AdamWTables& t) {
  return t.grad_scale ? 1.0f / *t.grad_scale : 1.0f;
}

template <typename T>
__device__ float4 read_block(const AdamWTensor& tensor, const AdamWBlock& block, float unscale) {
  const T* grad = static_cast<const T*>(tensor.grad) + block.grad_offset;
  float4 sums = make_float4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < block.length; i += kThreads) {
    const float g = beft_cuda::to_float(grad[i]) * unscale;
    sums.w += g * g;
  }
  return sums;
}

template <typename T>
__device__ float4 step_block(const AdamWTables& tables, const AdamWTensor& tensor,
                             const AdamWBlock& block, const AdamWFactors& factors, float unscale) {
  constexpr bool half = sizeof(T) == 2;
  T* param = static_cast<T*>(tensor.param) + block.param_offset;
  const T* grad = static_cast<const T*>(tensor.grad) + block.grad_offset;
  float* exp_avg = tables.state + block.flat_offset;
  float* exp_avg_sq = exp_avg + tables.elements;
  const float* initial = exp_avg + 2 * tables.elements;
  float* master = exp_avg + 3 * tables.elements;
  beft::AdamWScores scores;
#pragma unroll 4
  for (int i = threadIdx.x; i < block.length; i += kThreads) {
    const float g = beft_cuda::to_float(grad[i]);
    float b = beft_cuda::to_float(param[i]);
    if (half) {  // a parameter that is not its rounded master was written to by someone else
      T rounded;
      beft_cuda::store(&rounded, master[i]);
      if (beft_cuda::to_float(rounded) == b) b = master[i];
    }
    float m = exp_avg[i], v = exp_avg_sq[i];
    beft::adamw_element(b, m, v, g, factors);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (half) master[i] = b;
    beft_cuda::store(param + i, b);
    scores.add(b, initial[i], g * unscale);
  }
  return make_float4(scores.change_abs, scores.change_dot_initial, scores.change_dot_current,
                     scores.grad_sq);
}

template <int kTensors>
__global__ void __launch_bounds__(kThreads)
    gradient_norm(const __grid_constant__ Arguments<kTensors> arguments) {
  const AdamWTables& tables = arguments.tables;
  const AdamWBlock block = arguments.block();
  const AdamWTensor tensor = arguments.tensor(block.tensor);
  float4 mine = make_float4(0, 0, 0, 0);
  if (tensor.grad) {
    const float inverse = unscale(tables);
    mine = tensor.dtype == 0   ? read_block<float>(tensor, block, inverse)
           : tensor.dtype == 1 ? read_block<__nv_bfloat16>(tensor, block, inverse)
                               : read_block<__half>(tensor, block, inverse);
  }
  const float4 sums = block_sum(mine);
  if (threadIdx.x == 0) tables.sums[blockIdx.x] = sums;
  if (!is_last(tables.counters + tables.segments, gridDim.x)) return;
  const float4 total = sum_slots(tables.sums, 0, gridDim.x);
  if (threadIdx.x == 0) *tables.norm = sqrtf(total.w);
}

template <int kTensors>
__global__ void __launch_bounds__(kThreads)
    adamw_step(const __grid_constant__ Arguments<kTensors> arguments) {
  const AdamWTables& tables = arguments.tables;
  if (tables.found_inf && *tables.found_inf != 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *tables.norm = INFINITY;
    return;
  }
  const AdamWBlock block = arguments.block();
  const AdamWTensor tensor = arguments.tensor(block.tensor);
  float4 mine = make_float4(0, 0, 0, 0);
  if (tensor.grad) {
    __shared__ AdamWFactors factors;
    const float inverse = unscale(tables);
    if (threadIdx.x == 0) {
      AdamWGroup group = arguments.groups[tensor.group];
      if (tables.lr) group.lr = tables.lr[tensor.group];
      const float* norm = tables.global_norm ? tables.global_norm : tables.norm;
      const double clip =
          tables.max_grad_norm > 0 ? beft::clip_factor(*norm, tables.max_grad_norm) : 1;
      factors = beft::adamw_factors(group, tables.steps[block.tensor] + 1, clip * inverse);
    }
    __syncthreads();
    mine = tensor.dtype == 0   ? step_block<float>(tables, tensor, block, factors, inverse)
           : tensor.dtype == 1 ? step_block<__nv_bfloat16>(tables, tensor, block, factors, inverse)
                               : step_block<__half>(tables, tensor, block, factors, inverse);
  }
  const float4 sums = block_sum(mine);
  if (threadIdx.x == 0) tables.sums[blockIdx.x] = sums;

  const int64_t first = beft::within(tables.first_blocks[block.segment], 0, gridDim.x);
  const int64_t last = beft::within(tables.first_blocks[block.segment + 1], first, gridDim.x);
  if (tensor.grad && is_last(tables.counters + block.segment, last - first)) {
    const float4 total = sum_slots(tables.sums, first, last);
    if (threadIdx.x == 0) tables.scores[block.segment] = total;
  }
  if (!is_last(tables.counters + tables.segments, gridDim.x)) return;
  if (tables.max_grad_norm <= 0 || tables.global_norm) {
    const float4 total = sum_slots(tables.sums, 0, gridDim.x);
    if (threadIdx.x == 0) *tables.norm = sqrtf(total.w);
  }
  // Every block has read its tensor's count by now.
  for (int i = threadIdx.x; i < tables.tensors; i += kThreads)
    if (arguments.grads[i]) tables.steps[i] += 1;
}

template <int kTensors>
cudaError_t launch(const AdamWTensor* tensors, const AdamWGroup* groups, int group_count,
                   const AdamWTables& tables, cudaStream_t stream) {
  Arguments<kTensors> arguments{};
  arguments.tables = tables;
  for (int i = 0; i < group_count; ++i) arguments.groups[i] = groups[i];
  for (int i = 0; i < tables.tensors; ++i) {
    const AdamWTensor& t = tensors[i];
    if (t.param_size > UINT32_MAX || t.grad_size > UINT32_MAX) return cudaErrorInvalidValue;
    arguments.params[i] = t.param;
    arguments.grads[i] = t.grad;
    arguments.param_sizes[i] = static_cast<uint32_t>(t.param_size);
    arguments.grad_sizes[i] = static_cast<uint32_t>(t.grad_size);
    arguments.dtypes[i] = static_cast<uint16_t>(t.dtype);
    arguments.group_of[i] = static_cast<uint16_t>(t.group);
  }
  const dim3 grid(tables.block_count), block(kThreads);
  if (tables.max_grad_norm > 0 && !tables.global_norm) {
    gradient_norm<kTensors><<<grid, block, 0, stream>>>(arguments);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  adamw_step<kTensors><<<grid, block, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t beft_cuda::bias_adamw_step_ready() {
  cudaFuncAttributes unused;
  return cudaFuncGetAttributes(&unused, reinterpret_cast<const void*>(&adamw_step<kFewTensors>));
}

cudaError_t beft_cuda::bias_adamw_step(const AdamWTensor* tensors, const AdamWGroup* groups,
                                       int group_count, const AdamWTables& tables,
                                       cudaStream_t stream) {
  if (tables.tensors > kMaxTensors || group_count > kMaxGroups) return cudaErrorInvalidValue;
  if (tables.block_count < 1 || tables.segments < 1 || tables.tensors < 1)
    return cudaErrorInvalidValue;
  const auto run = tables.tensors <= kFewTensors    ? launch<kFewTensors>
                   : tables.tensors <= kSomeTensors ? launch<kSomeTensors>
                                                    : launch<kMaxTensors>;
  return run(tensors, groups, group_count, tables, stream);
}
