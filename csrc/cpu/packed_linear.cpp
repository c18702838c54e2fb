#include "ops/packed_linear.h"

#include "cpu/gemm.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

template <class W, class T>
void linear_panel(const PackedLinearParams& p, int64_t panel) {
  const W* weight = static_cast<const W*>(p.packed) + panel * p.pairs * kPair;
  T* out = static_cast<T*>(p.out) + panel * kPanel;
  const int64_t n = p.N - panel * kPanel;
  multiply_panel(p.wide, 2 * p.pairs, p.T, weight, p.pairs,
                 [&](int64_t t, const Vec(&total)[2]) { store_panel(out + t * p.N, total, n); });
}

}  // namespace

void widen_rows(const WidenRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = p.order ? p.order[t] : t;
    if (p.dtype == DType::kBFloat16)
      widen_row(static_cast<const BFloat16*>(p.x) + row * p.K, p.K, p.out + t * p.stride, p.stride);
    else
      widen_row(static_cast<const float*>(p.x) + row * p.K, p.K, p.out + t * p.stride, p.stride);
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
