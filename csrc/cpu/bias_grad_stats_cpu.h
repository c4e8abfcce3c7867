// The CPU operator's entry point: raw pointers, strides in elements, no torch.
#pragma once
#include <cstdint>

#include "cpu/convert.h"

namespace beft {

struct GradView {
  const void* data;  // (batch, tokens, width), or (rows, width) with offsets
  DType dtype;
  int64_t batch, tokens, width;
  int64_t stride_b, stride_t, stride_h;
  const int64_t* offsets;  // (batch + 1,), or null
};

// grad (width,) is written; sum and sum_sq (width,) are added to. Returns false, and reads and
// writes nothing but the offsets, where these do not ascend within [0, tokens].
bool bias_grad_stats_cpu(const GradView& view, float scale, int threads, float* grad, float* sum,
                         float* sum_sq);

}  // namespace beft
