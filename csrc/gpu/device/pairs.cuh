#pragma once
// Two neighbouring values at a time, a load of 4 bytes in bfloat16. Every even head dimension allows it.
#include "common/dtype.h"
#include "gpu/device/compat.h"

namespace blockdraft::gpu {

// Both rounded to nearest even, the first one in the lower half.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
#if defined(BLOCKDRAFT_ON_CUDA)
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return from_float<BFloat16>(low).bits | static_cast<uint32_t>(from_float<BFloat16>(high).bits) << 16;
#endif
}
__device__ inline float2 unpack_bfloat16(uint32_t pair) {
  return float2{to_float(BFloat16{static_cast<uint16_t>(pair)}), to_float(BFloat16{static_cast<uint16_t>(pair >> 16)})};
}

__device__ inline float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ inline float2 load_pair(const BFloat16* p) { return unpack_bfloat16(*reinterpret_cast<const uint32_t*>(p)); }
__device__ inline void store_pair(float* p, float2 x) { *reinterpret_cast<float2*>(p) = x; }
__device__ inline void store_pair(BFloat16* p, float2 x) { *reinterpret_cast<uint32_t*>(p) = pack_bfloat16(x.x, x.y); }

}  // namespace blockdraft::gpu
