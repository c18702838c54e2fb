#include "gpu/device/compat.h"
#include "gpu/device/reduce.cuh"
#include "ops/residual_norm.h"

namespace blockdraft::gpu {
namespace {

constexpr int kThreads = 256;

// One block per row.
template <class T>
__global__ void __launch_bounds__(kThreads) residual_norm_kernel(ResidualNormParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.H;
  const T* hidden_states = static_cast<const T*>(p.hidden_states) + row;
  const float* residual = p.residual ? p.residual + row : nullptr;
  T* normed = static_cast<T*>(p.normed) + row;
  float* residual_out = p.residual_out + row;

  // Merge.
  float sum = 0;
  for (int64_t h = threadIdx.x; h < p.H; h += kThreads) {
    float merged = (to_float(hidden_states[h]) + p.hidden_states_bias[h]) * p.hidden_states_scale[h];
    if (residual) merged += (residual[h] + p.residual_bias[h]) * p.residual_scale[h];
    residual_out[h] = merged;
    const float stored = to_float(from_float<T>(merged));
    sum += stored * stored;
  }

  // Normalise. Each thread reads back what it wrote itself, so residual_out needs no barrier.
  const float inverse_rms = rsqrtf(block_sum<kThreads>(sum) / static_cast<float>(p.H) + p.eps);
  for (int64_t h = threadIdx.x; h < p.H; h += kThreads)
    normed[h] = from_float<T>(to_float(from_float<T>(residual_out[h])) * inverse_rms * p.norm_weight[h]);
}

}  // namespace

const char* residual_norm(const ResidualNormParams& p, void* stream) {
  visit_dtype(p.dtype, [&](auto tag) {
    BLOCKDRAFT_LAUNCH(residual_norm_kernel<decltype(tag)>, dim3(p.T), dim3(kThreads), 0, stream, p);
  });
  return last_error();
}

}  // namespace blockdraft::gpu
