#pragma once
// Contract of packed_embedding: rows of a packed matrix, so that a tied embedding and LM head are one copy of the
// weights (1.07 GB in ZAYA1-8B). On a GPU, where the host does not look at values, an id out of range gives zeros.
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

struct PackedEmbeddingParams {
  const int32_t* token_ids;  // [T], in [0, V)
  const void* packed;        // [panels, pairs, 64] of dtype
  void* out;                 // [T, H] of dtype
  int32_t* arrivals;         // GPU: [arrival_count], set to 0 for later kernels; may be nullptr
  int64_t T, V, H, pairs, arrival_count;
  DType dtype;
};

namespace cpu {
// Rows [begin, end).
void packed_embedding(const PackedEmbeddingParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* packed_embedding(const PackedEmbeddingParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
