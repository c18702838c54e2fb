#pragma once
// Tiles of 32 keys as they lie in the pages (ops/cca_mix.h).
#include "gpu/device/pairs.cuh"
#include "gpu/device/panel.cuh"

namespace blockdraft::gpu {

constexpr int kTileKeys = kPanel;

__device__ inline int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }
__device__ inline int64_t key_tile_size(int64_t D) { return kTileKeys * D; }
__device__ inline int64_t value_tile_size(int64_t D) { return kTileKeys * kPanel * panels_of(D); }

// k[d], k[d + 1] of key `slot` of a tile; d is even.
__device__ inline void store_key_pair(BFloat16* tile, int64_t slot, int64_t d, float2 k) {
  store_pair(tile + d / 2 * kPair + in_pair<BFloat16>(slot, d), k);
}
__device__ inline void store_key_pair(float* tile, int64_t slot, int64_t d, float2 k) {
  tile[d / 2 * kPair + in_pair<float>(slot, d)] = k.x;
  tile[d / 2 * kPair + in_pair<float>(slot, d + 1)] = k.y;
}

template <class T>
__device__ int64_t value_place(int64_t slot, int64_t d) {
  return d / kPanel * kPanel * kTileKeys + slot / 2 * kPair + in_pair<T>(d % kPanel, slot);
}

}  // namespace blockdraft::gpu
