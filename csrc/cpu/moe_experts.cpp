#include "ops/moe_experts.h"

#include "cpu/gemm.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

struct Scales {
  Vec of[2];  // 32 outputs
};

// Those of the first n outputs from `scales` on; ones where weights have none, which change no bit.
BLOCKDRAFT_INLINE Scales load_scales(const float* scales, int64_t n) {
  alignas(64) float values[kPanel] = {};
  for (int64_t c = 0; c < minimum(kPanel, n); ++c) values[c] = scales ? scales[c] : 1.0f;
  return {{load(values), load(values + kLanes)}};
}

// Gate panel, then up panel over the same rows; the gate's sums wait in a buffer of one row block.
template <class T, class W>
void up_panels(const MoeExpertsParams& p, int64_t touched, int64_t panel) {
  const int64_t panels = blocks(p.I, kPanel), size = p.pairs * kPair, stride = p.hidden_stride;
  const int64_t expert = p.expert_ids[touched], first_output = panel * kPanel;
  const W* gate = static_cast<const W*>(p.gate_up_proj) + (expert * panels + panel) * 2 * size;
  const float* scales = p.gate_up_scales ? p.gate_up_scales + expert * 2 * p.I + first_output : nullptr;
  const Scales gate_scales = load_scales(scales, p.I - first_output);
  const Scales up_scales = load_scales(scales ? scales + p.I : nullptr, p.I - first_output);
  const int64_t n = minimum(kPanel, stride - first_output);
  Vec gates[kBlockRows][2];
  for (int64_t first = p.expert_rows[touched]; first < p.expert_rows[touched + 1]; first += kBlockRows) {
    const int64_t rows = minimum(kBlockRows, p.expert_rows[touched + 1] - first);
    const auto* x = static_cast<const RowOf<T>*>(p.rows) + first * 2 * p.pairs;
    auto* hidden = static_cast<RowOf<T>*>(p.hidden) + first * stride + first_output;
    multiply_panel(x, 2 * p.pairs, rows, gate, p.pairs, [&](int64_t t, const Vec(&total)[2]) {
      gates[t][0] = total[0] * gate_scales.of[0];
      gates[t][1] = total[1] * gate_scales.of[1];
    });
    multiply_panel(x, 2 * p.pairs, rows, gate + size, p.pairs, [&](int64_t t, const Vec(&total)[2]) {
      for (int64_t j = 0; j < 2; ++j) {
        const Vec product = silu(gates[t][j]) * (total[j] * up_scales.of[j]);
        for (int64_t c = 0; c < minimum(kLanes, n - j * kLanes); ++c)
          narrow_to_row<T>(product[c], hidden + t * stride + j * kLanes + c);
      }
    });
  }
}

template <class T, class W>
void down_panel(const MoeExpertsParams& p, int64_t touched, int64_t panel) {
  const int64_t panels = blocks(p.H, kPanel), stride = p.hidden_stride, first = p.expert_rows[touched];
  const int64_t expert = p.expert_ids[touched], n = p.H - panel * kPanel;
  const W* weight = static_cast<const W*>(p.down_proj) + (expert * panels + panel) * p.inner_pairs * kPair;
  const Scales scales = load_scales(p.down_scales ? p.down_scales + expert * p.H + panel * kPanel : nullptr, n);
  multiply_panel(static_cast<const RowOf<T>*>(p.hidden) + first * stride, stride, p.expert_rows[touched + 1] - first,
                 weight, p.inner_pairs, [&](int64_t t, const Vec(&total)[2]) {
                   const int64_t row = p.sorted_rows[first + t];
                   const Vec weighted[2] = {total[0] * scales.of[0] * p.topk_weights[row],
                                            total[1] * scales.of[1] * p.topk_weights[row]};
                   store_panel(static_cast<T*>(p.out) + row * p.H + panel * kPanel, weighted, n);
                 });
}

template <class T>
void skip_row(const MoeExpertsParams& p, int64_t row) {
  T* out = static_cast<T*>(p.out) + row * p.H;
  const T* x = p.skip_identity ? static_cast<const T*>(p.x) + row * p.H : nullptr;
  for (int64_t h = 0; h < p.H; ++h) narrow(x ? widen(x[h]) * p.topk_weights[row] : 0.0f, out + h);
}

// f with a value of the type of activations and one of that of weights.
template <class F>
void visit_types(const MoeExpertsParams& p, F f) {
  const bool bytes = p.weight_dtype == DType::kInt8;
  if (p.dtype == DType::kBFloat16)
    bytes ? f(BFloat16{}, Int8{}) : f(BFloat16{}, BFloat16{});
  else
    bytes ? f(float{}, Int8{}) : f(float{}, float{});
}

}  // namespace

void moe_experts_up(const MoeExpertsParams& p, int64_t begin, int64_t end) {
  const int64_t panels = blocks(p.I, kPanel);
  for (int64_t task = begin; task < end; ++task)
    visit_types(p, [&](auto x, auto w) { up_panels<decltype(x), decltype(w)>(p, task / panels, task % panels); });
}

void moe_experts_down(const MoeExpertsParams& p, int64_t begin, int64_t end) {
  const int64_t panels = blocks(p.H, kPanel);
  for (int64_t task = begin; task < end; ++task)
    visit_types(p, [&](auto x, auto w) { down_panel<decltype(x), decltype(w)>(p, task / panels, task % panels); });
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
