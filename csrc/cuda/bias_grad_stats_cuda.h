// Declarations of csrc/cuda/bias_grad_stats.cu for the bindings; the contract stands there.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

cudaError_t beft_bias_grad_stats_ready();

cudaError_t beft_bias_grad_stats_cuda(const void* grad_output, int dtype, int64_t batch,
                                      int64_t tokens, int64_t width, int64_t stride_b,
                                      int64_t stride_t, int64_t stride_h,
                                      const int64_t* example_offsets, int64_t chunks, float scale,
                                      float* workspace, float* grad, float* sum, float* sum_sq,
                                      cudaStream_t stream);

cudaError_t beft_bias_example_grads_cuda(const void* grad_output, int dtype, int64_t batch,
                                         int64_t tokens, int64_t width, int64_t stride_b,
                                         int64_t stride_t, int64_t stride_h,
                                         const int64_t* example_offsets, int64_t chunks,
                                         float scale, float* workspace, void* out, int out_dtype,
                                         int64_t out_stride, cudaStream_t stream);
