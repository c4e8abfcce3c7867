// A step of equal tensors for programs that call the CPU operator without torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/bias_adamw_step_cpu.h"

// State, scores and blocks of `tensors` tensors of `width` elements, each of its exact size; the
// caller adds the parameters and gradients in order.
struct AdamWCase {
  AdamWCase(int64_t tensors, int64_t width, int64_t dtype, double max_grad_norm)
      : width(width),
        dtype(dtype),
        state((dtype ? 4 : 3) * tensors * width, 0.5f),
        steps(tensors),
        scores(4 * tensors) {
    const int64_t all = tensors * width;
    for (int64_t t = 0; t < tensors; ++t)
      for (int64_t k = 0; k < width; k += 1024)
        blocks.push_back({t, t, k, k, t * width + k, std::min<int64_t>(1024, width - k)});
    view = {{},
            {{1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0}},
            blocks.data(),
            static_cast<int64_t>(blocks.size()),
            state.data(),
            state.data() + all,
            state.data() + 2 * all,
            dtype ? state.data() + 3 * all : nullptr,
            steps.data(),
            scores.data(),
            max_grad_norm,
            -1.0,
            1.0};
  }
  AdamWCase(const AdamWCase&) = delete;  // the view points into its own members

  void add(char* param, char* grad) {
    view.tensors.push_back({param, grad, dtype, 0, width, width});
  }

  int64_t width, dtype;
  std::vector<float> state, steps, scores;
  std::vector<beft::AdamWBlock> blocks;
  beft::AdamWView view;
};
