#include "ops/packed_embedding.h"

#include "cpu/panel.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

template <class T>
void embed_row(const PackedEmbeddingParams& p, int64_t t) {
  const int64_t id = p.token_ids[t];
  const T* panel = static_cast<const T*>(p.packed) + id / kPanel * p.pairs * kPair;
  T* out = static_cast<T*>(p.out) + t * p.H;
  for (int64_t k = 0; k < p.H; ++k) out[k] = panel[k / 2 * kPair + in_pair<T>(id % kPanel, k)];
}

}  // namespace

void packed_embedding(const PackedEmbeddingParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    if (p.dtype == DType::kBFloat16)
      embed_row<BFloat16>(p, t);
    else
      embed_row<float>(p, t);
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
