// Declarations of csrc/cuda/bias_adamw_step.cu for the bindings.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "../bias_adamw_step.h"

namespace beft_cuda {

constexpr int kMaxTensors = 1024;  // their addresses travel as kernel arguments, 32 KB at most
constexpr int kMaxGroups = 16;

struct AdamWTensor {
  void* param;
  const void* grad;  // null: not touched in this step
  int dtype;         // of both: 0 fp32, 1 bf16, 2 fp16
  int group;
};

// All but `grad_scale` and `found_inf`, null where there is no scaler, and `lr`, null where the
// groups' own rates hold, must point to memory of the device.
struct AdamWTables {
  const beft::AdamWBlock* blocks;  // (block_count,), those of one segment together
  const int64_t* first_blocks;     // (segments + 1,)
  float* state;                    // (3 or 4, elements): exp_avg, exp_avg_sq, initial, master
  float* steps;                    // (tensors,)
  float4* scores;                  // (segments,): AdamWScores
  const float* lr;                 // (groups,)
  const float* grad_scale;
  const float* found_inf;  // not zero: nothing is written but `norm`, infinity
  float4* sums;            // (block_count,) scratch
  unsigned* counters;      // (segments + 1,), zero before the first call, and after each
  float* norm;             // the global norm of the unscaled gradient, before clipping
  int64_t elements;
  double max_norm;  // 0: no clipping
  int block_count, segments, tensors;
};

// One launch, or two with clipping. Asynchronous on `stream`; never waits for the device.
cudaError_t bias_adamw_step(const AdamWTensor* tensors, const beft::AdamWGroup* groups, int group_count,
                       const AdamWTables& tables, cudaStream_t stream);

}  // namespace beft_cuda
