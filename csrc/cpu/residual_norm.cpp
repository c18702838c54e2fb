#include "ops/residual_norm.h"

#include "cpu/simd.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

// Values h .. h + n - 1, n at most sixteen; zeros after.
template <class T>
BLOCKDRAFT_INLINE Vec load_part(const T* x, int64_t h, int64_t n) {
  if (n >= kLanes) return load(x + h);
  T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = x[h + i];
  return load(part);
}
template <class T>
BLOCKDRAFT_INLINE void store_part(T* out, int64_t h, int64_t n, Vec x) {
  if (n >= kLanes) return store(out + h, x);
  T part[kLanes];
  store(part, x);
  for (int64_t i = 0; i < n; ++i) out[h + i] = part[i];
}

template <class T>
void residual_norm_row(const ResidualNormParams& p, int64_t t) {
  const T* hidden_states = static_cast<const T*>(p.hidden_states) + t * p.H;
  const float* residual = p.residual ? p.residual + t * p.H : nullptr;
  T* normed = static_cast<T*>(p.normed) + t * p.H;
  float* residual_out = p.residual_out + t * p.H;

  Vec sums = {};
  for (int64_t h = 0; h < p.H; h += kLanes) {
    const int64_t n = p.H - h;
    const auto part = [&](const auto* x) { return load_part(x, h, n); };
    Vec merged = (part(hidden_states) + part(p.hidden_states_bias)) * part(p.hidden_states_scale);
    if (residual) merged += (part(residual) + part(p.residual_bias)) * part(p.residual_scale);
    store_part(residual_out, h, n, merged);
    const Vec stored = as_stored<T>(merged);
    sums += stored * stored;
  }

  const float inverse_rms = 1 / __builtin_sqrtf(sum_lanes(sums) / static_cast<float>(p.H) + p.eps);
  for (int64_t h = 0; h < p.H; h += kLanes) {
    const Vec stored = as_stored<T>(load_part(residual_out, h, p.H - h));
    store_part(normed, h, p.H - h, stored * inverse_rms * load_part(p.norm_weight, h, p.H - h));
  }
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
