#include "ops/moe_experts.h"

#include "cpu/gemm.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

// Gate panel, then up panel over the same rows; the gate's sums wait in a buffer of one row block.
template <class W>
void up_panels(const MoeExpertsParams& p, int64_t touched, int64_t panel) {
  const int64_t panels = blocks(p.I, kPanel), size = p.pairs * kPair, stride = p.hidden_stride;
  const W* gate = static_cast<const W*>(p.gate_up_proj) + (p.expert_ids[touched] * panels + panel) * 2 * size;
  const int64_t n = minimum(kPanel, stride - panel * kPanel);
  Vec gates[kBlockRows][2];
  for (int64_t first = p.expert_rows[touched]; first < p.expert_rows[touched + 1]; first += kBlockRows) {
    const int64_t rows = minimum(kBlockRows, p.expert_rows[touched + 1] - first);
    const auto* x = static_cast<const RowOf<W>*>(p.rows) + first * 2 * p.pairs;
    auto* hidden = static_cast<RowOf<W>*>(p.hidden) + first * stride + panel * kPanel;
    multiply_panel(x, 2 * p.pairs, rows, gate, p.pairs, [&](int64_t t, const Vec(&total)[2]) {
      gates[t][0] = total[0];
      gates[t][1] = total[1];
    });
    multiply_panel(x, 2 * p.pairs, rows, gate + size, p.pairs, [&](int64_t t, const Vec(&total)[2]) {
      for (int64_t j = 0; j < 2; ++j) {
        const Vec product = silu(gates[t][j]) * total[j];
        for (int64_t c = 0; c < minimum(kLanes, n - j * kLanes); ++c)
          narrow_to_row<W>(product[c], hidden + t * stride + j * kLanes + c);
      }
    });
  }
}

template <class W>
void down_panel(const MoeExpertsParams& p, int64_t touched, int64_t panel) {
  const int64_t panels = blocks(p.H, kPanel), stride = p.hidden_stride, first = p.expert_rows[touched];
  const W* weight =
      static_cast<const W*>(p.down_proj) + (p.expert_ids[touched] * panels + panel) * p.inner_pairs * kPair;
  const int64_t n = p.H - panel * kPanel;
  multiply_panel(static_cast<const RowOf<W>*>(p.hidden) + first * stride, stride, p.expert_rows[touched + 1] - first,
                 weight, p.inner_pairs, [&](int64_t t, const Vec(&total)[2]) {
                   const int64_t row = p.sorted_rows[first + t];
                   const Vec weighted[2] = {total[0] * p.topk_weights[row], total[1] * p.topk_weights[row]};
                   store_panel(static_cast<W*>(p.out) + row * p.H + panel * kPanel, weighted, n);
                 });
}

template <class T>
void skip_row(const MoeExpertsParams& p, int64_t row) {
  T* out = static_cast<T*>(p.out) + row * p.H;
  const T* x = p.skip_identity ? static_cast<const T*>(p.x) + row * p.H : nullptr;
  for (int64_t h = 0; h < p.H; ++h) narrow(x ? widen(x[h]) * p.topk_weights[row] : 0.0f, out + h);
}

}  // namespace

void moe_experts_up(const MoeExpertsParams& p, int64_t begin, int64_t end) {
  const int64_t panels = blocks(p.I, kPanel);
  for (int64_t task = begin; task < end; ++task) {
    if (p.dtype == DType::kBFloat16)
      up_panels<BFloat16>(p, task / panels, task % panels);
    else
      up_panels<float>(p, task / panels, task % panels);
  }
}

void moe_experts_down(const MoeExpertsParams& p, int64_t begin, int64_t end) {
  const int64_t panels = blocks(p.H, kPanel);
  for (int64_t task = begin; task < end; ++task) {
    if (p.dtype == DType::kBFloat16)
      down_panel<BFloat16>(p, task / panels, task % panels);
    else
      down_panel<float>(p, task / panels, task % panels);
  }
}

void moe_experts_skip(const MoeExpertsParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.dtype == DType::kBFloat16)
      skip_row<BFloat16>(p, p.sorted_rows[i]);
    else
      skip_row<float>(p, p.sorted_rows[i]);
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
