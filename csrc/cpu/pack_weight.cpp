#include "ops/pack_weight.h"

#include "cpu/panel.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

template <class T>
void pack_panel(const PackWeightParams& p, int64_t matrix, int64_t panel) {
  const int64_t half_rows = p.N / p.halves, half = panel % p.halves;
  const int64_t first = panel / p.halves * kPanel;
  const T* weight = static_cast<const T*>(p.weight) + (matrix * p.N + half * half_rows + first) * p.K;
  T* packed = static_cast<T*>(p.packed) + (matrix * p.panels + panel) * p.pairs * kPair;
  const int64_t rows = minimum(kPanel, half_rows - first);
  for (int64_t k = 0; k < 2 * p.pairs; ++k)
    for (int64_t c = 0; c < kPanel; ++c)
      packed[k / 2 * kPair + in_pair<T>(c, k)] = c < rows && k < p.K ? weight[c * p.K + k] : T{};
}

}  // namespace

void pack_weight(const PackWeightParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.dtype == DType::kBFloat16)
      pack_panel<BFloat16>(p, i / p.panels, i % p.panels);
    else
      pack_panel<float>(p, i / p.panels, i % p.panels);
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
