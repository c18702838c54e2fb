#include <type_traits>

#include "gpu/device/panel.cuh"
#include "gpu/device/reduce.cuh"
#include "ops/moe_router.h"

namespace blockdraft::gpu {
namespace {

// Two kernels. The state z is a product of 1 MB of weights, a panel a block. All after it is three small products in a
// row, 272 KB, and a tile of rows takes them in one block: at 16 rows two blocks read as fast as the L2 cache gives one
// SM, about 1.2 us a layer, where a launch each would take as long and a barrier of the grid longer.
constexpr int kDownWarps = 512 / kWarpSize;  // R = 256 leaves 8 blocks: 16 warps have a whole panel on its way
constexpr int kDownThreads = 512;
constexpr int kWarps = kWarpSize == 32 ? 8 : 4;  // a panel, or a load of two, of R = 256 each
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = kTileRows;
constexpr size_t kMostShared = kWarpSize == 32 ? 48 << 10 : 64 << 10;  // without asking the driver
constexpr int part_rows(int rows) { return rows < 16 ? rows : 16; }

// A float32 activation meets bfloat16 weights as three bfloat16 parts, which together are all its 24 bits: products
// are exact, and only sums round, as in float32.
template <class T>
constexpr int kParts = sizeof(T) == 2 ? 3 : 1;

// The activations of a block: two buffers in turn, each [kParts][kRows][stride], in shared memory or, where R is too
// large for that, in scratch. Logits are float32 [kRows][E + 1] in the second one.
template <class T>
struct Layout {
  // An odd multiple of 32: 16-byte loads of two neighbouring rows in bfloat16 meet different banks.
  __host__ __device__ static int64_t stride(int64_t R) { return (R + 31) / 64 * 64 + 32; }
  __host__ __device__ static int64_t buffer(const MoeRouterParams& p) {
    const int64_t rows = kParts<T> * kRows * stride(p.R) * sizeof(T), logits = kRows * (p.E + 1) * sizeof(float);
    return ((rows > logits ? rows : logits) + 15) / 16 * 16;
  }
  static int64_t blocks(const MoeRouterParams& p) { return (p.T + kRows - 1) / kRows; }
  static bool fits(const MoeRouterParams& p) { return 2 * buffer(p) <= static_cast<int64_t>(kMostShared); }
};

// The next kernel has few blocks, so the weights it reads come from memory while this one works.
template <class T>
__device__ void prefetch(const void* packed, int64_t size) {
  constexpr int kLine = 128 / sizeof(T);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDownThreads + threadIdx.x;
  for (int64_t at = thread * kLine; at < size; at += int64_t{gridDim.x} * kDownThreads * kLine)
    prefetch_l2(static_cast<const T*>(packed) + at);
}

// A block takes kWarpPanels panels and kBlockRows rows of the state.
template <class T, int kBlockRows, bool kWhole>
__global__ void __launch_bounds__(kDownThreads) moe_router_down_kernel(MoeRouterParams p) {
  using Product = BlockProduct<T, kWarpPanels, kBlockRows, kDownWarps, part_rows(kBlockRows)>;
  __shared__ __align__(16) float shared[Product::kFloats];
  const Product product = {shared};
  const int64_t panels = (p.R + kPanel - 1) / kPanel, matrix = (p.R + 1) / 2 * kPair;
  prefetch<T>(p.fc1, panels * matrix);
  prefetch<T>(p.fc2, panels * matrix);
  prefetch<T>(p.out_proj, (p.E + kPanel) / kPanel * matrix);

  const unsigned chunks = static_cast<unsigned>((p.T + kBlockRows - 1) / kBlockRows);
  const int64_t panel = blockIdx.x / chunks * kWarpPanels, begin = int64_t{blockIdx.x % chunks} * kBlockRows;
  const T* x = static_cast<const T*>(p.x);
  const Panels<T> weights = {static_cast<const T*>(p.down_proj) + panel * p.pairs * kPair, p.pairs, panels - panel};
  const auto row = [&](int i) { return begin + i < p.T ? x + (begin + i) * p.H : nullptr; };
  product.template multiply<kWhole>(weights, row, p.H, is_aligned(x, p.H), [&](int first) {
    for (int at = threadIdx.x; at < part_rows(kBlockRows) * Product::kOutputs; at += kDownThreads) {
      const int i = at / Product::kOutputs, c = at % Product::kOutputs;
      const int64_t t = begin + first + i, r = panel * kPanel + c;
      if (t >= p.T || r >= p.R) continue;
      float z = product.sum(i, c) + p.down_proj_bias[r];
      if (p.router_states) z += p.router_states[t * p.R + r] * p.router_states_scale[r];
      p.router_states_out[t * p.R + r] = z;
    }
  });
}

__device__ inline void store_parts(float* row, int64_t, float x) { *row = x; }
__device__ inline void store_parts(BFloat16* row, int64_t to_next, float x) {
#pragma unroll
  for (int part = 0; part < kParts<BFloat16>; ++part) {  // cut off, not rounded: nothing becomes infinite
    row[part * to_next] = BFloat16{static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16)};
    x -= to_float(row[part * to_next]);
  }
}

// A warp a row.
template <class T>
__device__ void norm_rows(const MoeRouterParams& p, int64_t first, int rows, T* out, int64_t stride) {
  const int lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x / kWarpSize; i < rows; i += kWarps) {
    const float* z = p.router_states_out + (first + i) * p.R;
    float squares = 0;
    for (int64_t r = lane; r < p.R; r += kWarpSize) squares += z[r] * z[r];
    const float inverse_rms = rsqrtf(warp_sum(squares) / static_cast<float>(p.R) + p.eps);
    for (int64_t r = lane; r < p.R; r += kWarpSize)
      store_parts(out + i * stride + r, kRows * stride, z[r] * inverse_rms * p.norm_weight[r]);
  }
}

// out(i, n, sum) for the `outputs` outputs of a layer. A warp takes the panels of a load and all k: nothing to add up
// between warps.
template <bool kWhole, class T, class Out>
__device__ void multiply(const MoeRouterParams& p, const void* packed, int64_t outputs, int rows, const T* in,
                         int64_t stride, Out out) {
  const int64_t pairs = (p.R + 1) / 2, panels = (outputs + kPanel - 1) / kPanel;
  for (int64_t panel = threadIdx.x / kWarpSize * kWarpPanels; panel < panels; panel += kWarps * kWarpPanels) {
    const Panels<T> weights = {static_cast<const T*>(packed) + panel * pairs * kPair, pairs, panels - panel};
    PanelSums<T, kWarpPanels, kParts<T> * kRows> sums;
    sums.template add<kWhole>(
        weights, [&](int i) { return i % kRows < rows ? in + i * stride : nullptr; }, p.R, true, 0, 1);
    if constexpr (std::is_same_v<T, BFloat16>) sums.join_tiles();
    sums.each(
        [&](int i, int c, const float4& four) {
          const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (const int64_t n = panel * kPanel + c + j; i < rows && n < outputs) out(i, n, values[j]);
        },
        0, kRows);
  }
}

__device__ inline float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }

// The class with the largest biased probability, by one warp; a NaN never wins, so the id is in range whatever comes.
__device__ inline void choose(const MoeRouterParams& p, const float* router_logits, int64_t t) {
  const int lane = threadIdx.x % kWarpSize;
  float highest = -INFINITY, sum = 0, best_score = -INFINITY;
  int best = 0;
  for (int64_t e = lane; e <= p.E; e += kWarpSize) highest = fmaxf(highest, router_logits[e]);
  highest = warp_reduce(highest, [](float a, float b) { return fmaxf(a, b); });
  for (int64_t e = lane; e <= p.E; e += kWarpSize) sum += expf(router_logits[e] - highest);
  sum = warp_sum(sum);
  for (int64_t e = lane; e <= p.E; e += kWarpSize) {
    const float score = expf(router_logits[e] - highest) / sum + p.balancing_biases[e];
    if (score > best_score) best_score = score, best = static_cast<int>(e);
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const float score = shuffle_xor(best_score, mask);
    const int e = shuffle_xor(best, mask);
    if (score > best_score || (score == best_score && e < best)) best_score = score, best = e;
  }
  if (lane == 0) {
    p.topk_ids[t] = best;
    p.topk_weights[t] = expf(router_logits[best] - highest) / sum;
  }
}

// A block takes a tile of rows from the state to the choice.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) moe_router_kernel(MoeRouterParams p) {
  BLOCKDRAFT_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t first = int64_t{blockIdx.x} * kRows, stride = Layout<T>::stride(p.R), size = Layout<T>::buffer(p);
  const int rows = static_cast<int>(p.T - first < kRows ? p.T - first : kRows);
  unsigned char* own = p.hidden ? reinterpret_cast<unsigned char*>(p.hidden) + blockIdx.x * 2 * size : shared;
  T *one = reinterpret_cast<T*>(own), *two = reinterpret_cast<T*>(own + size);
  float* router_logits = reinterpret_cast<float*>(two);

  norm_rows(p, first, rows, one, stride);
  __syncthreads();
  multiply<kWhole>(p, p.fc1, p.R, rows, one, stride, [&](int i, int64_t n, float sum) {
    store_parts(two + i * stride + n, kRows * stride, gelu(sum + p.fc1_bias[n]));
  });
  __syncthreads();
  multiply<kWhole>(p, p.fc2, p.R, rows, two, stride, [&](int i, int64_t n, float sum) {
    store_parts(one + i * stride + n, kRows * stride, gelu(sum + p.fc2_bias[n]));
  });
  __syncthreads();
  constexpr bool kWholeLoads = kWhole && kWarpPanels == 1;  // 17 classes are one panel
  multiply<kWholeLoads>(p, p.out_proj, p.E + 1, rows, one, stride,
                        [&](int i, int64_t n, float sum) { router_logits[i * (p.E + 1) + n] = sum; });
  __syncthreads();
  for (int i = threadIdx.x / kWarpSize; i < rows; i += kWarps) choose(p, router_logits + i * (p.E + 1), first + i);
}

template <class T, int kBlockRows, bool kWhole>
void launch_down(const MoeRouterParams& p, void* stream) {
  constexpr int kOutputs = kWarpPanels * kPanel;
  const int64_t chunks = (p.T + kBlockRows - 1) / kBlockRows, strips = (p.R + kOutputs - 1) / kOutputs;
  BLOCKDRAFT_LAUNCH((moe_router_down_kernel<T, kBlockRows, kWhole>), dim3(static_cast<unsigned>(chunks * strips)),
                    dim3(kDownThreads), 0, stream, p);
}

template <class T, bool kWhole>
void launch(const MoeRouterParams& p, void* stream) {
  BLOCKDRAFT_LAUNCH((moe_router_kernel<T, kWhole>), dim3(static_cast<unsigned>(Layout<T>::blocks(p))), dim3(kThreads),
                    p.hidden ? 0 : 2 * Layout<T>::buffer(p), stream, p);
}

}  // namespace

int64_t moe_router_hidden(const MoeRouterParams& p) {
  int64_t size = 0;
  visit_dtype(p.dtype, [&](auto tag) {
    using Rows = Layout<decltype(tag)>;
    if (!Rows::fits(p)) size = Rows::blocks(p) * 2 * Rows::buffer(p) / static_cast<int64_t>(sizeof(float));
  });
  return size;
}

const char* moe_router(const MoeRouterParams& p, void* stream) {
  // The shapes of real models; see is_whole in panel.cuh.
  const bool whole =
      reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.H % kPanel == 0 && p.R % (kWarpPanels * kPanel) == 0;
  if (p.dtype == DType::kFloat32) {
    launch_down<float, 16, false>(p, stream);
    launch<float, false>(p, stream);
  } else if (!whole) {
    launch_down<BFloat16, 16, false>(p, stream);
    launch<BFloat16, false>(p, stream);
  } else {
    if (p.T <= kTileRows)
      launch_down<BFloat16, kTileRows, true>(p, stream);
    else if (p.T <= 64)
      launch_down<BFloat16, 16, true>(p, stream);
    else
      launch_down<BFloat16, 32, true>(p, stream);
    launch<BFloat16, true>(p, stream);
  }
  return last_error();
}

}  // namespace blockdraft::gpu
