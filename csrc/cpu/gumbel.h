#pragma once
// Gumbel noise as a function of (seed, sample, position, token id): Philox4x32-10 (Salmon et al., SC 2011) keyed by the
// seed, counter (id, position, sample, 0), first word of the result.
#include "cpu/simd.h"

namespace blockdraft::cpu {

struct NoiseKey {
  int64_t seed;
  int32_t sample, position;
};

// Philox bits of ids first .. first + 15.
static inline WordVec philox(const NoiseKey& key, uint32_t first) {
  constexpr uint32_t kMultiply0 = 0xd2511f53, kMultiply1 = 0xcd9e8d57, kWeyl0 = 0x9e3779b9, kWeyl1 = 0xbb67ae85;
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (uint32_t i = 0; i < kLanes; ++i) {
    c0[i] = first + i;
    c1[i] = static_cast<uint32_t>(key.position);
    c2[i] = static_cast<uint32_t>(key.sample);
    c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kWeyl0, k1 += kWeyl1)
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(c0[i]) * kMultiply0, p1 = static_cast<uint64_t>(c2[i]) * kMultiply1;
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
  WordVec bits;
  __builtin_memcpy(&bits, c0, sizeof bits);
  return bits;
}

// g = -log(e), e = -log(1 - v) exponential, v = (bits + 1/2) / 2^32. Large g come from small v, where log1p keeps all
// of v's bits: log1p(-v) = log(w) * v / (1 - w) with w = 1 - v as rounded. v stays below 1, so no g is infinite.
static inline Vec gumbel(const NoiseKey& key, uint32_t first) {
  Vec v = __builtin_convertvector(philox(key, first), Vec) * 0x1p-32f + 0x1p-33f;
  v = v > 1 - 0x1p-24f ? splat(1 - 0x1p-24f) : v;
  const Vec w = 1.0f - v;
  const IntVec tiny = w == 1.0f;
  const Vec e = tiny ? v : log(w) * v / ((tiny ? splat(0.5f) : w) - 1.0f);
  return -log(e);
}

}  // namespace blockdraft::cpu
