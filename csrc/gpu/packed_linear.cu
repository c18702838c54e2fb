#include "gpu/device/arrive.cuh"
#include "gpu/device/norm_row.cuh"
#include "gpu/device/panel.cuh"
#include "ops/packed_linear.h"

namespace blockdraft::gpu {
namespace {

constexpr int kWarps = kWarpSize == 32 ? 8 : 4;
constexpr int kThreads = kWarps * kWarpSize;

// A block takes kWarpPanels panels and kRows rows. Blocks with the same panels are neighbours: the first one that reads
// a weight leaves it in the L2 cache for the others.
template <class T, class Out, int kRows>
__device__ void multiply(const PackedLinearParams& p, float* shared) {
  using Product = BlockProduct<T, kWarpPanels, kRows, kWarps>;
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

template <class T, int kRows>
constexpr int kSums = BlockProduct<T, kWarpPanels, kRows, kWarps>::kFloats;

template <class T, class Out, int kRows>
__global__ void __launch_bounds__(kThreads, 2) packed_linear_kernel(PackedLinearParams p) {
  __shared__ __align__(16) float shared[kSums<T, kRows>];
  multiply<T, Out, kRows>(p, shared);
}

// All rows are those of every block, and the last one normalises them.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    packed_linear_norm_kernel(PackedLinearParams p, ResidualNormParams norm, bool aligned, int32_t* arrivals) {
  __shared__ __align__(16) float shared[kSums<T, kRows>];
  multiply<T, T, kRows>(p, shared);
  if (is_last(arrivals, 1, static_cast<int>(gridDim.x), shared)) norm_rows_of<T, kWarps>(norm, aligned, 0, p.T);
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

template <class T, int kRows>
void launch_with_norm(const PackedLinearParams& p, const ResidualNormParams& norm, int32_t* arrivals, void* stream) {
  static_assert(kMostJoinedRows == 32, "the rows of a block");
  const int64_t strips = (p.panels + kWarpPanels - 1) / kWarpPanels;
  BLOCKDRAFT_LAUNCH((packed_linear_norm_kernel<T, kRows>), dim3(static_cast<unsigned>(strips)), dim3(kThreads), 0,
                    stream, p, norm, is_aligned(norm), arrivals);
}

}  // namespace

const char* packed_linear_norm(const PackedLinearParams& p, const ResidualNormParams& norm, int32_t* arrivals,
                               void* stream) {
  visit_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (kTileRows == 8)
      if (p.T <= 8) return launch_with_norm<T, 8>(p, norm, arrivals, stream);
    p.T <= 16 ? launch_with_norm<T, 16>(p, norm, arrivals, stream) : launch_with_norm<T, 32>(p, norm, arrivals, stream);
  });
  return last_error();
}

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
