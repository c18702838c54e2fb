#pragma once
// The packed order of a panel: 32 outputs, two neighbouring k at a time. gemm.h multiplies by it; weights, pages of
// keys (keys as outputs, head dimensions as k) and pages of values (head dimensions as outputs, keys as k) have it.
#include "cpu/simd.h"

namespace blockdraft::cpu {

constexpr int64_t kPanel = 32;  // outputs of a panel
constexpr int64_t kPair = 64;   // elements of a panel for two k

// Place of (output c, k) in its pair: [32][2] in bfloat16, as matrix instructions want it, and bytes; [2][32] in
// float32. Mxfp4 is in mxfp4.h.
template <class T>
BLOCKDRAFT_INLINE int64_t in_pair(int64_t c, int64_t k) {
  return sizeof(T) < 4 ? 2 * c + (k & 1) : (k & 1) * kPanel + c;
}

// Key `slot` of a page: k [D] and v [D] of one head into the tiles of that head and page.
template <class T>
BLOCKDRAFT_INLINE void write_key(const T* k, T* tile, int64_t slot, int64_t D) {
  for (int64_t d = 0; d < D; ++d) tile[d / 2 * kPair + in_pair<T>(slot, d)] = k[d];
}
template <class T>
BLOCKDRAFT_INLINE void write_value(const T* v, T* tile, int64_t slot, int64_t D) {
  for (int64_t d = 0; d < D; ++d)
    tile[d / kPanel * kPanel * kPanel + slot / 2 * kPair + in_pair<T>(d % kPanel, slot)] = v[d];
}

}  // namespace blockdraft::cpu
