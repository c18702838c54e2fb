#include "ops/moe_experts.h"

#include "cpu/mxfp4.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

struct Scales {
  Vec of[2];  // 32 outputs
};

// Those of the first n outputs from `scales` on; ones where weights have none, which change no bit.
BLOCKDRAFT_INLINE Scales load_scales(const float* scales, int64_t n) {
  if (scales && n >= kPanel) return {{load(scales), load(scales + kLanes)}};
  alignas(64) float values[kPanel] = {};
  for (int64_t c = 0; c < minimum(kPanel, n); ++c) values[c] = scales ? scales[c] : 1.0f;
  return {{load(values), load(values + kLanes)}};
}

template <class W>
BLOCKDRAFT_INLINE const W* panel_at(W, const void* weights, const void*, int64_t index, int64_t pairs) {
  return static_cast<const W*>(weights) + index * pairs * kPair;
}
BLOCKDRAFT_INLINE MxPanel panel_at(Mxfp4, const void* weights, const void* scales, int64_t index, int64_t pairs) {
  return mx_panel(weights, scales, index * pairs);
}

// By which sums are multiplied, from a row on; nullptr for nothing.
template <class W>
BLOCKDRAFT_INLINE const float* row_scales(const void* scales, int64_t row) {
  return kScaledRows<W> ? static_cast<const float*>(scales) + row : nullptr;
}

template <class T, class W>
void up_panels(const MoeExpertsParams& p, int64_t touched, int64_t panel) {
  const int64_t panels = blocks(p.I, kPanel), stride = p.hidden_stride;
  const int64_t expert = p.expert_ids[touched], first_output = panel * kPanel;
  const auto gate = panel_at(W{}, p.gate_up_proj, p.gate_up_scales, (expert * panels + panel) * 2, p.pairs);
  const float* scales = row_scales<W>(p.gate_up_scales, expert * 2 * p.I + first_output);
  const Scales gate_scales = load_scales(scales, p.I - first_output);
  const Scales up_scales = load_scales(scales ? scales + p.I : nullptr, p.I - first_output);
  const int64_t n = minimum(kPanel, stride - first_output);
  for (int64_t first = p.expert_rows[touched]; first < p.expert_rows[touched + 1]; first += kBlockRows) {
    const int64_t rows = minimum(kBlockRows, p.expert_rows[touched + 1] - first);
    const auto* x = static_cast<const RowOf<T>*>(p.rows) + first * 2 * p.pairs;
    auto* hidden = static_cast<RowOf<T>*>(p.hidden) + first * stride + first_output;
    multiply_two_panels(x, 2 * p.pairs, rows, gate, p.pairs, [&](int64_t t, const Vec(&total)[4]) {
      for (int64_t j = 0; j < 2; ++j) {
        const Vec product = silu(total[j] * gate_scales.of[j]) * (total[2 + j] * up_scales.of[j]);
        for (int64_t c = 0; c < minimum(kLanes, n - j * kLanes); ++c)
          narrow_to_row<T>(product[c], hidden + t * stride + j * kLanes + c);
      }
    });
  }
}

// `total` is of row t of the expert that was touched as number `touched`.
template <class T, class W>
BLOCKDRAFT_INLINE void store_weighted(const MoeExpertsParams& p, int64_t touched, int64_t panel, int64_t t,
                                      const Vec* total) {
  const int64_t row = p.sorted_rows[p.expert_rows[touched] + t], n = p.H - panel * kPanel;
  const float* scales = row_scales<W>(p.down_scales, p.expert_ids[touched] * p.H + panel * kPanel);
  const Scales scale = load_scales(scales, n);
  const Vec weighted[2] = {total[0] * scale.of[0] * p.topk_weights[row], total[1] * scale.of[1] * p.topk_weights[row]};
  store_panel(static_cast<T*>(p.out) + row * p.H + panel * kPanel, weighted, n);
}

// Returns how many panels it took, at most `most`: two for few rows.
template <class T, class W>
int64_t down_panels(const MoeExpertsParams& p, int64_t touched, int64_t panel, int64_t most) {
  const int64_t panels = blocks(p.H, kPanel), stride = p.hidden_stride;
  const int64_t first = p.expert_rows[touched], rows = p.expert_rows[touched + 1] - first;
  const int64_t index = p.expert_ids[touched] * panels + panel;
  const auto weight = panel_at(W{}, p.down_proj, p.down_scales, index, p.inner_pairs);
  const auto* hidden = static_cast<const RowOf<T>*>(p.hidden) + first * stride;
  if (minimum(most, panels - panel) > 1 && rows <= few_rows(hidden)) {
    multiply_two_panels(hidden, stride, rows, weight, p.inner_pairs, [&](int64_t t, const Vec(&total)[4]) {
      store_weighted<T, W>(p, touched, panel, t, total);
      store_weighted<T, W>(p, touched, panel + 1, t, total + 2);
    });
    return 2;
  }
  multiply_panel(hidden, stride, rows, weight, p.inner_pairs,
                 [&](int64_t t, const Vec(&total)[2]) { store_weighted<T, W>(p, touched, panel, t, total); });
  return 1;
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
  const auto with = [&](auto x) {
    if (p.weight_dtype == DType::kInt8) return f(x, Int8{});
    if (p.weight_dtype == DType::kFloat8) return f(x, Float8{});
    if (p.weight_dtype == DType::kMxfp4) return f(x, Mxfp4{});
    f(x, x);
  };
  p.dtype == DType::kBFloat16 ? with(BFloat16{}) : with(float{});
}

}  // namespace

void moe_experts_up(const MoeExpertsParams& p, int64_t begin, int64_t end) {
  const int64_t panels = blocks(p.I, kPanel);
  for (int64_t task = begin; task < end; ++task)
    visit_types(p, [&](auto x, auto w) { up_panels<decltype(x), decltype(w)>(p, task / panels, task % panels); });
}

void moe_experts_down(const MoeExpertsParams& p, int64_t begin, int64_t end) {
  const int64_t panels = blocks(p.H, kPanel);
  for (int64_t task = begin; task < end;)
    visit_types(p, [&](auto x, auto w) {
      task += down_panels<decltype(x), decltype(w)>(p, task / panels, task % panels, end - task);
    });
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
