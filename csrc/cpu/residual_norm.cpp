#include "ops/residual_norm.h"

#include "cpu/simd.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

template <class T>
void residual_norm_row(const ResidualNormParams& p, int64_t t) {
  const T* hidden_states = static_cast<const T*>(p.hidden_states) + t * p.H;
  const float* residual = p.residual ? p.residual + t * p.H : nullptr;
  T* normed = static_cast<T*>(p.normed) + t * p.H;
  float* residual_out = p.residual_out + t * p.H;

  // Merge. Sixteen partial sums: vectors without reordering, and an error of H / 16 additions.
  float sums[kLanes] = {};
  const auto merge = [&](int64_t h, int64_t lane) {
    float merged = (widen(hidden_states[h]) + p.hidden_states_bias[h]) * p.hidden_states_scale[h];
    if (residual) merged += (residual[h] + p.residual_bias[h]) * p.residual_scale[h];
    residual_out[h] = merged;
    const float stored = as_stored<T>(merged);
    sums[lane] += stored * stored;
  };
  int64_t h = 0;
  for (; h + kLanes <= p.H; h += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) merge(h + lane, lane);
  for (int64_t lane = 0; h < p.H; ++h, ++lane) merge(h, lane);

  // Normalise.
  float sum = 0;
  for (float s : sums) sum += s;
  const float inverse_rms = 1 / __builtin_sqrtf(sum / static_cast<float>(p.H) + p.eps);
  for (h = 0; h < p.H; ++h) narrow(as_stored<T>(residual_out[h]) * inverse_rms * p.norm_weight[h], normed + h);
}

}  // namespace

void residual_norm(const ResidualNormParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    if (p.dtype == DType::kBFloat16)
      residual_norm_row<BFloat16>(p, t);
    else
      residual_norm_row<float>(p, t);
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
