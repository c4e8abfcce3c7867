// Declarations of csrc/cuda/bias_adamw_step.cu for the bindings.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "../bias_adamw_step.h"

namespace beft_cuda {

constexpr int kMaxTensors = 1024;  // their addresses travel as kernel arguments, 32 KB at most
constexpr int kMaxGroups = 16;

// All must point to memory of the device but what may be null: `grad_scale` and `found_inf` where
// there is no scaler, `lr` where the groups' own rates hold, `global_norm` where there are no
// gradients but these.
struct AdamWTables {
  const beft::AdamWBlock* blocks;  // (block_count,), those of one segment together
  const int64_t* first_blocks;     // (segments + 1,)
  float* state;                    // (3 or 4, elements): exp_avg, exp_avg_sq, initial, master
  float* steps;                    // (tensors,)
  float4* scores;                  // (segments,): AdamWScores
  const float* lr;                 // (groups,)
  const float* grad_scale;
  const float* found_inf;    // not zero: nothing is written but `norm`, infinity
  const float* global_norm;  // to clip by
  float4* sums;              // (block_count,) scratch
  unsigned* counters;        // (segments + 1,), zero before the first call, and after each
  float* norm;               // the norm of these gradients, unscaled and before clipping
  int64_t elements;
  double max_grad_norm;  // 0: no clipping
  int block_count, segments, tensors;
};

// Loads the kernels onto the current device, where one runs there.
cudaError_t bias_adamw_step_ready();

// One launch, or two with clipping. Asynchronous on `stream`; never waits for the device.
cudaError_t bias_adamw_step(const beft::AdamWTensor* tensors, const beft::AdamWGroup* groups,
                            int group_count, const AdamWTables& tables, cudaStream_t stream);

}  // namespace beft_cuda
