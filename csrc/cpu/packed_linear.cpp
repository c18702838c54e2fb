#include "ops/packed_linear.h"

#include "cpu/gemm.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

template <class W, class T>
void linear_panel(const PackedLinearParams& p, int64_t panel) {
  const W* weight = static_cast<const W*>(p.packed) + panel * p.pairs * kPair;
  T* out = static_cast<T*>(p.out) + panel * kPanel;
  const int64_t n = p.N - panel * kPanel;
  multiply_panel(static_cast<const RowOf<W>*>(p.rows), 2 * p.pairs, p.T, weight, p.pairs,
                 [&](int64_t t, const Vec(&total)[2]) { store_panel(out + t * p.N, total, n); });
}

template <class T>
void arrange(const ArrangeRowsParams& p, int64_t t) {
  const int64_t row = p.order ? p.order[t] : t;
  arrange_row(static_cast<const T*>(p.x) + row * p.K, p.K, static_cast<RowOf<T>*>(p.out) + t * p.stride, p.stride);
}

}  // namespace

void arrange_rows(const ArrangeRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    if (p.dtype == DType::kBFloat16)
      arrange<BFloat16>(p, t);
    else
      arrange<float>(p, t);
  }
}

void packed_linear(const PackedLinearParams& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    if (p.dtype == DType::kFloat32)
      linear_panel<float, float>(p, panel);
    else if (p.out_float32)
      linear_panel<BFloat16, float>(p, panel);
    else
      linear_panel<BFloat16, BFloat16>(p, panel);
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
