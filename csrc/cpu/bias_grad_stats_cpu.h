// The entry points of bias_grad_stats and bias_example_grads on the CPU: raw pointers, strides in
// elements, no torch.
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

struct RowsView {
  void* data;  // (batch, width)
  DType dtype;
  int64_t stride;  // elements from one row to the next
};

// out is written; its dtype is f32 or bf16. Returns false as above.
bool bias_example_grads_cpu(const GradView& view, float scale, int threads, const RowsView& out);

}  // namespace beft
