// Arithmetic of the AdamW step over biases, shared by the CPU and the GPU code. No torch.
//
// Decoupled weight decay as in Loshchilov & Hutter 2019 (arXiv 1711.05101), in the order of
// operations of torch.optim.AdamW.
#pragma once

#include <cmath>
#include <cstdint>

#include "bias_grad_stats.h"

namespace beft {

// One parameter group's settings; `sign` is -1 to maximise.
struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay, sign;
};

// One run of consecutive elements of one tensor, the unit of work. Offsets count elements: from
// the parameter's, the gradient's and the flat state's first. int64, so that a (blocks, 6)
// table of int64 is an array of these.
struct AdamWBlock {
  int64_t tensor, segment, param_offset, grad_offset, flat_offset, length;
};

// One tensor of a step. Sizes count elements: those within reach of the parameter's address, and
// the gradient's.
struct AdamWTensor {
  void* param;
  const void* grad;  // null: not touched in this step
  int64_t dtype;     // of both: 0 fp32, 1 bf16, 2 fp16
  int64_t group, param_size, grad_size;
};

BEFT_HD int64_t within(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// The part of `block` that lies inside of a parameter, a gradient and a state of these sizes: a
// kernel that takes its table from anyone reads and writes nothing else.
BEFT_HD AdamWBlock inside(AdamWBlock block, int64_t param_size, int64_t grad_size,
                          int64_t elements) {
  block.param_offset = within(block.param_offset, 0, param_size);
  block.grad_offset = within(block.grad_offset, 0, grad_size);
  block.flat_offset = within(block.flat_offset, 0, elements);
  block.length = within(block.length, 0, param_size - block.param_offset);
  block.length = within(block.length, 0, grad_size - block.grad_offset);
  block.length = within(block.length, 0, elements - block.flat_offset);
  return block;
}

// Whether a table of blocks keeps what the kernels take for granted: `first_blocks` ascends from
// 0 to `count`, the blocks of a segment are those between two of its numbers and of one tensor,
// and each block has 1 to `longest` elements, inside of everything that it names.
inline bool table_fits(const AdamWBlock* blocks, int64_t count, const int64_t* first_blocks,
                       int64_t segments, const AdamWTensor* tensors, int64_t tensor_count,
                       int64_t elements, int64_t longest) {
  if (first_blocks[0] != 0 || first_blocks[segments] != count) return false;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t begin = first_blocks[s], end = first_blocks[s + 1];
    if (begin < 0 || begin > end || end > count) return false;
    for (int64_t i = begin; i < end; ++i) {
      const AdamWBlock& b = blocks[i];
      if (b.segment != s || b.tensor < 0 || b.tensor >= tensor_count) return false;
      if (b.tensor != blocks[begin].tensor || b.length < 1 || b.length > longest) return false;
      const AdamWTensor& t = tensors[b.tensor];
      if (inside(b, t.param_size, t.grad_size, elements).length != b.length) return false;
      if (b.param_offset < 0 || b.grad_offset < 0 || b.flat_offset < 0) return false;
    }
  }
  return true;
}

// What a tensor's elements share in one step.
struct AdamWFactors {
  float grad, decay, beta1_rest, beta2, beta2_rest, inverse_root, eps, step_size;
};

// step: number of this step, from 1. grad_factor: unscales and clips.
BEFT_HD AdamWFactors adamw_factors(const AdamWGroup& group, double step, double grad_factor) {
  AdamWFactors f;
  f.grad = static_cast<float>(grad_factor * group.sign);
  f.decay = static_cast<float>(1 - group.lr * group.weight_decay);
  f.beta1_rest = static_cast<float>(1 - group.beta1);
  f.beta2 = static_cast<float>(group.beta2);
  f.beta2_rest = static_cast<float>(1 - group.beta2);
  // In double: near step 1 the difference 1 - beta2 would lose half of a float's digits.
  f.inverse_root = static_cast<float>(1 / sqrt(1 - pow(group.beta2, step)));
  f.eps = static_cast<float>(group.eps);
  f.step_size = static_cast<float>(group.lr / (1 - pow(group.beta1, step)));
  return f;
}

// The moments of one element, or of a vector of them. raw: the gradient before unscaling.
template <typename Float>
BEFT_HD void adamw_moments(Float& m, Float& v, const Float& raw, const AdamWFactors& f) {
  const Float g = raw * f.grad;
  m += f.beta1_rest * (g - m);
  v = f.beta2 * v + f.beta2_rest * g * g;
}

template <typename Float>
BEFT_HD void adamw_move(Float& b, const Float& m, const Float& root_of_v, const AdamWFactors& f) {
  b = f.decay * b - f.step_size * (m / (root_of_v * f.inverse_root + f.eps));
}

BEFT_HD void adamw_element(float& b, float& m, float& v, float raw, const AdamWFactors& f) {
  adamw_moments(m, v, raw, f);
  adamw_move(b, m, sqrtf(v), f);
}

// Sums of one segment, with d = b - b0: every score follows without cancellation, as
// <b, b0> = |b0|^2 + <d, b0> and |b|^2 = |b0|^2 + <d, b0> + <d, b>. The last is zero for b = 0.
struct AdamWScores {
  float change_abs = 0, change_dot_initial = 0, change_dot_current = 0, grad_sq = 0;

  BEFT_HD void add(float b, float b0, float g) {
    const float d = b - b0;
    change_abs += d < 0 ? -d : d;
    change_dot_initial += d * b0;
    change_dot_current += d * b;
    grad_sq += g * g;
  }

  BEFT_HD AdamWScores& operator+=(const AdamWScores& other) {
    change_abs += other.change_abs;
    change_dot_initial += other.change_dot_initial;
    change_dot_current += other.change_dot_current;
    grad_sq += other.grad_sq;
    return *this;
  }
};

// Factor that brings a gradient of norm `norm` to at most `max_grad_norm` (torch's definition);
// 1 where max_grad_norm is 0: no clipping.
BEFT_HD double clip_factor(double norm, double max_grad_norm) {
  const double factor = max_grad_norm / (norm + 1e-6);
  return max_grad_norm <= 0 || factor > 1 ? 1.0 : factor;
}

}  // namespace beft
