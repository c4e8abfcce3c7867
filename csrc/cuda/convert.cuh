// fp32 to and from what a tensor holds.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace beft_cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }
__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half(x); }

}  // namespace beft_cuda
