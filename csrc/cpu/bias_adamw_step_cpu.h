// The CPU optimizer step's entry point: raw pointers, no torch.
#pragma once
#include <cstdint>
#include <vector>

#include "bias_adamw_step.h"
#include "cpu/convert.h"

namespace beft {

struct AdamWTensor {
  void* param;
  const void* grad;  // null: not touched in this step
  DType dtype;       // of both
  int64_t group;
};

struct AdamWView {
  std::vector<AdamWTensor> tensors;
  std::vector<AdamWGroup> groups;
  const AdamWBlock* blocks;  // (block_count,), those of one segment together
  int64_t block_count;
  float *exp_avg, *exp_avg_sq;  // (N,)
  const float* initial;         // (N,)
  float* master;                // (N,): the values of half-precision parameters; else unused
  float* steps;                 // (tensors,)
  float* scores;                // (segments, 4): AdamWScores
  double max_norm;              // 0: no clipping
  double inverse_scale;         // 1 / loss scale
};

// Returns the gradient's global norm, unscaled and before clipping.
double bias_adamw_cpu(const AdamWView& view, int threads);

}  // namespace beft
