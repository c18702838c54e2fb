#pragma once
// Gumbel noise as a function of (seed, sample, position, token id), with the bits of csrc/cpu/gumbel.h.
#include <cstdint>

#include "gpu/device/compat.h"

namespace blockdraft::gpu {

struct NoiseKey {
  int64_t seed;
  int32_t sample, position;
};

// First word of Philox4x32-10.
__device__ inline uint32_t philox(const NoiseKey& key, uint32_t id) {
  constexpr uint32_t kMultiply0 = 0xd2511f53, kMultiply1 = 0xcd9e8d57, kWeyl0 = 0x9e3779b9, kWeyl1 = 0xbb67ae85;
  uint32_t c0 = id, c1 = static_cast<uint32_t>(key.position), c2 = static_cast<uint32_t>(key.sample), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += kWeyl0, k1 += kWeyl1) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * kMultiply0, p1 = static_cast<uint64_t>(c2) * kMultiply1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  return c0;
}

// v = (bits + 1/2) / 2^32 as float32 has it; below 1, so that no noise is infinite.
__device__ inline float gumbel(const NoiseKey& key, uint32_t id) {
  const float v = static_cast<float>(philox(key, id)) * 0x1p-32f + 0x1p-33f;
  return -logf(-log1pf(-(v < 1 - 0x1p-24f ? v : 1 - 0x1p-24f)));
}

}  // namespace blockdraft::gpu
