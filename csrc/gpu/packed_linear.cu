#include "gpu/device/panel.cuh"
#include "ops/packed_linear.h"

namespace blockdraft::gpu {
namespace {

constexpr int kWarps = kWarpSize == 32 ? 8 : 4;
constexpr int kThreads = kWarps * kWarpSize;

// A block takes kWarpPanels panels and kRows rows. Blocks with the same panels are neighbours: the first one that reads
// a weight leaves it in the L2 cache for the others.
template <class T, class Out, int kRows>
__global__ void __launch_bounds__(kThreads, 2) packed_linear_kernel(PackedLinearParams p) {
  using Product = BlockProduct<T, kWarpPanels, kRows, kWarps>;
  __shared__ __align__(16) float shared[Product::kFloats];
  const int64_t chunks = (p.T + kRows - 1) / kRows;
  const int64_t panel = blockIdx.x / chunks * kWarpPanels, first = blockIdx.x % chunks * kRows;
  const T* x = static_cast<const T*>(p.x);
  const Panels<T> weights = {static_cast<const T*>(p.packed) + panel * p.pairs * kPair, p.pairs, p.panels - panel};
  const Product product = {shared};
  product.multiply(
      weights, [&](int i) { return first + i < p.T ? x + (first + i) * p.K : nullptr; }, p.K, is_aligned(x, p.K));
  for (int at = threadIdx.x; at < kRows * Product::kOutputs; at += kThreads) {
    const int64_t t = first + at / Product::kOutputs, n = panel * kPanel + at % Product::kOutputs;
    if (t < p.T && n < p.N)
      static_cast<Out*>(p.out)[t * p.N + n] =
          from_float<Out>(product.sum(at / Product::kOutputs, at % Product::kOutputs));
  }
}

template <class T, class Out, int kRows>
void launch(const PackedLinearParams& p, void* stream) {
  const int64_t chunks = (p.T + kRows - 1) / kRows, strips = (p.panels + kWarpPanels - 1) / kWarpPanels;
  BLOCKDRAFT_LAUNCH((packed_linear_kernel<T, Out, kRows>), dim3(static_cast<unsigned>(chunks * strips)), dim3(kThreads),
                    0, stream, p);
}

template <class T, class Out>
void launch_for_rows(const PackedLinearParams& p, void* stream) {
  if constexpr (kTileRows == 8)
    if (p.T <= 8) return launch<T, Out, 8>(p, stream);
  p.T <= 16 ? launch<T, Out, 16>(p, stream) : launch<T, Out, 32>(p, stream);
}

}  // namespace

const char* packed_linear(const PackedLinearParams& p, void* stream) {
  if (p.dtype == DType::kFloat32)
    launch_for_rows<float, float>(p, stream);
  else if (p.out_float32)
    launch_for_rows<BFloat16, float>(p, stream);
  else
    launch_for_rows<BFloat16, BFloat16>(p, stream);
  return last_error();
}

}  // namespace blockdraft::gpu
