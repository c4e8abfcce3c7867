// The CPU optimizer step's entry point: raw pointers, no torch.
#pragma once
#include <cstdint>
#include <vector>

#include "bias_adamw_step.h"
#include "cpu/convert.h"

namespace beft {

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
  double max_grad_norm;         // 0: no clipping
  double global_norm;           // to clip by, of other devices' gradients too; -1: of these
  double inverse_scale;         // 1 / loss scale
};

// Returns the norm of all these gradients, unscaled and before clipping.
double bias_adamw_step_cpu(const AdamWView& view, int threads);

}  // namespace beft
