#include "ops/moe_router.h"

#include "cpu/gemm.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

template <class W>
void down_panel(const MoeRouterParams& p, int64_t panel) {
  const W* weight = static_cast<const W*>(p.down_proj) + panel * p.pairs * kPair;
  const int64_t first = panel * kPanel, n = minimum(kPanel, p.R - first);
  multiply_panel(static_cast<const RowOf<W>*>(p.rows), 2 * p.pairs, p.T, weight, p.pairs,
                 [&](int64_t t, const Vec(&total)[2]) {
                   float* z = p.router_states_out + t * p.R + first;
                   for (int64_t c = 0; c < n; ++c) {
                     z[c] = total[c / kLanes][c % kLanes] + p.down_proj_bias[first + c];
                     if (p.router_states)
                       z[c] += p.router_states[t * p.R + first + c] * p.router_states_scale[first + c];
                   }
                 });
}

void norm_row(const MoeRouterParams& p, const float* z, float* h) {
  float sums[kLanes] = {};
  for (int64_t r = 0; r < p.R; ++r) sums[r % kLanes] += z[r] * z[r];
  float sum = 0;
  for (float s : sums) sum += s;
  const float inverse_rms = 1 / __builtin_sqrtf(sum / static_cast<float>(p.R) + p.eps);
  for (int64_t r = 0; r < p.R; ++r) h[r] = z[r] * inverse_rms * p.norm_weight[r];
  for (int64_t r = p.R; r < p.hidden_stride; ++r) h[r] = 0;
}

// out = activation(x weight^T + bias) for rows of hidden_stride floats; outputs from `size` on become 0.
template <class W>
void hidden_layer(const MoeRouterParams& p, const void* packed, const float* bias, int64_t size, int64_t rows,
                  const float* x, float* out) {
  const int64_t pairs = blocks(p.R, 2), panels = blocks(size, kPanel);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const W* weight = static_cast<const W*>(packed) + panel * pairs * kPair;
    const int64_t first = panel * kPanel;
    float own_bias[kPanel] = {};
    for (int64_t c = 0; bias && c < minimum(kPanel, size - first); ++c) own_bias[c] = bias[first + c];
    multiply_panel(x, p.hidden_stride, rows, weight, pairs, [&](int64_t t, const Vec(&total)[2]) {
      float* h = out + t * p.hidden_stride + first;
      for (int64_t j = 0; j < 2; ++j)
        store(h + j * kLanes, bias ? gelu(total[j] + load(own_bias + j * kLanes)) : total[j]);
      for (int64_t c = size - first; c < kPanel; ++c) h[c] = 0;
    });
  }
}

// The class with the largest biased probability; a NaN never wins, so the id is in range whatever comes.
// router_logits become exp(logit - highest); there is room for whole vectors.
void choose(const MoeRouterParams& p, float* router_logits, int64_t t) {
  const int64_t classes = p.E + 1;
  float highest = router_logits[0], sum = 0;
  for (int64_t e = 1; e < classes; ++e) highest = maximum(highest, router_logits[e]);
  for (int64_t e = 0; e < classes; e += kLanes) store(router_logits + e, exp(load(router_logits + e) - highest));
  for (int64_t e = 0; e < classes; ++e) sum += router_logits[e];
  int32_t best = 0;
  float best_score = -__builtin_inff(), best_weight = 0;
  for (int64_t e = 0; e < classes; ++e) {
    const float weight = router_logits[e] / sum;
    if (e == 0) best_weight = weight;
    if (weight + p.balancing_biases[e] > best_score) {
      best_score = weight + p.balancing_biases[e];
      best = static_cast<int32_t>(e);
      best_weight = weight;
    }
  }
  p.topk_ids[t] = best;
  p.topk_weights[t] = best_weight;
}

template <class W>
void route(const MoeRouterParams& p, int64_t begin, int64_t end) {
  float* h = p.hidden + begin * p.hidden_stride;
  float* other = p.hidden + (p.T + begin) * p.hidden_stride;
  const int64_t rows = end - begin;
  for (int64_t t = 0; t < rows; ++t) norm_row(p, p.router_states_out + (begin + t) * p.R, h + t * p.hidden_stride);
  hidden_layer<W>(p, p.fc1, p.fc1_bias, p.R, rows, h, other);
  hidden_layer<W>(p, p.fc2, p.fc2_bias, p.R, rows, other, h);
  hidden_layer<W>(p, p.out_proj, nullptr, p.E + 1, rows, h, other);
  for (int64_t t = 0; t < rows; ++t) choose(p, other + t * p.hidden_stride, begin + t);
}

}  // namespace

void moe_router_down(const MoeRouterParams& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    if (p.dtype == DType::kBFloat16)
      down_panel<BFloat16>(p, panel);
    else
      down_panel<float>(p, panel);
  }
}

void moe_router(const MoeRouterParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kBFloat16)
    route<BFloat16>(p, begin, end);
  else
    route<float>(p, begin, end);
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
