#include "gpu/device/norm_row.cuh"
#include "ops/residual_norm.h"

namespace blockdraft::gpu {
namespace {

// One block per row. A thread has the same values, aligned or not.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads) residual_norm_kernel(ResidualNormParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.H, begin = threadIdx.x * kRun;
  float sum = 0;
  for (int64_t h = begin; h < p.H; h += kNormThreads * kRun) sum = merge_run<T, kAligned>(p, row, h, sum);
  // Each thread reads back what it wrote itself, so residual_out needs no barrier.
  const float inverse_rms = rsqrtf(block_sum<kNormThreads>(sum) / static_cast<float>(p.H) + p.eps);
  for (int64_t h = begin; h < p.H; h += kNormThreads * kRun) normalise_run<T, kAligned>(p, row, h, inverse_rms);
}

template <class T, bool kAligned>
void launch(const ResidualNormParams& p, void* stream) {
  BLOCKDRAFT_LAUNCH((residual_norm_kernel<T, kAligned>), dim3(p.T), dim3(kNormThreads), 0, stream, p);
}

}  // namespace

const char* residual_norm(const ResidualNormParams& p, void* stream) {
  visit_dtype(p.dtype, [&](auto tag) {
    is_aligned(p) ? launch<decltype(tag), true>(p, stream) : launch<decltype(tag), false>(p, stream);
  });
  return last_error();
}

}  // namespace blockdraft::gpu
