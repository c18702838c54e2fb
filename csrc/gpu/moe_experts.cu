#include <limits>

#include "gpu/device/panel.cuh"
#include "ops/moe_experts.h"

namespace blockdraft::gpu {
namespace {

// Two kernels: `hidden` of all routed rows, then `out`. A block takes one expert, a panel or two of its weights, and
// all rows of that expert, which it finds by itself: no kernel before that sorts, no host that waits for counts, and a
// block of an expert without rows is gone after one look at topk_ids. Each row has one producer.
//
// The weights are read once for kRows rows of an expert. 48 rows take all registers of a block an SM, 64 spilled; few
// rows leave room for a second block, which has its loads on their way while the first one adds up.
constexpr int kWarps = kWarpSize == 32 ? 8 : 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int part_rows(int rows) { return rows < 16 ? rows : 16; }  // whose sums are in shared memory at a time
constexpr int down_panels(int rows) { return rows <= 16 ? kWarpPanels : 2; }
constexpr int blocks_per_sm(int rows) { return rows <= 16 ? 2 : 1; }

// The next rows of `expert` from row `from` on, in order: up to kRows into `rows`, -1 after the last; `next`: where to
// look for more. One warp.
template <int kRows>
__device__ void find_rows(const MoeExpertsParams& p, int expert, int from, int32_t* rows, int32_t* next) {
  constexpr int kLook = 256 / kWarpSize;  // ids of a lane on their way together
  const int lane = threadIdx.x % kWarpSize;
  int found = 0;
  for (; from < p.T && found < kRows; from += kLook * kWarpSize) {
    int32_t ids[kLook];
#pragma unroll
    for (int i = 0; i < kLook; ++i) {
      const int t = from + i * kWarpSize + lane;
      ids[i] = t < p.T ? p.topk_ids[t] : -1;
    }
#pragma unroll
    for (int i = 0; i < kLook; ++i) {
      const uint64_t lanes = ballot(ids[i] == expert);
      const int place = found + __popcll(lanes & ((uint64_t{1} << lane) - 1));
      const int t = from + i * kWarpSize + lane;
      if (ids[i] == expert && place < kRows) rows[place] = t;
      if (ids[i] == expert && place == kRows - 1) *next = t + 1;
      found += __popcll(lanes);
    }
  }
  for (int place = found + lane; place < kRows; place += kWarpSize) rows[place] = -1;
  if (found < kRows && lane == 0) *next = static_cast<int32_t>(p.T);
}

// chunk(rows) for the rows of `expert`, kRows at a time, the last of them -1.
template <int kRows, class F>
__device__ void for_rows_of(const MoeExpertsParams& p, int expert, F chunk) {
  __shared__ int32_t rows[kRows];
  __shared__ int32_t next;
  for (int from = 0; from < p.T;) {
    if (threadIdx.x < kWarpSize) find_rows<kRows>(p, expert, from, rows, &next);
    __syncthreads();
    if (rows[0] < 0) return;
    from = next;
    chunk(rows);
    __syncthreads();  // the next rows and sums go where these were
  }
}

// Of the sum of an output of weights of type W.
template <class W>
__device__ float scale_of(const void* scales, int64_t output) {
  if constexpr (kScaledRows<W>) return static_cast<const float*>(scales)[output];
  return 1;
}

__device__ inline float silu(float x) { return x / (1 + expf(-x)); }

// A block: one expert, 32 of its inner outputs, gate panel and up panel.
template <class T, class W, int kRows, bool kWhole>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kRows)) moe_experts_up_kernel(MoeExpertsParams p) {
  using Product = BlockProduct<T, 2, kRows, kWarps, part_rows(kRows), W>;
  __shared__ __align__(16) float shared[Product::kFloats];
  const Product product = {shared};
  const int strips = static_cast<int>((p.I + kPanel - 1) / kPanel), block = static_cast<int>(blockIdx.x);
  const int expert = block / strips, strip = block % strips;
  const T* x = static_cast<const T*>(p.x);
  const auto weights = panels_at(W{}, p.gate_up_proj, p.gate_up_scales, int64_t{block} * 2, p.pairs, 2);
  const int64_t first_row = expert * 2 * p.I;
  for_rows_of<kRows>(p, expert, [&](const int32_t* rows) {
    const auto row = [&](int i) { return rows[i] < 0 ? nullptr : x + rows[i] * p.H; };
    product.template multiply<kWhole>(weights, row, p.H, is_aligned(x, p.H), [&](int first) {
#pragma unroll 1  // the sums of the other parts are still there
      for (int at = threadIdx.x; at < part_rows(kRows) * kPanel; at += kThreads) {
        const int i = at / kPanel, c = at % kPanel, t = rows[first + i];
        const int n = strip * kPanel + c;
        if (t < 0 || n >= p.I) continue;
        const float gate = product.sum(i, c) * scale_of<W>(p.gate_up_scales, first_row + n);
        const float up = product.sum(i, kPanel + c) * scale_of<W>(p.gate_up_scales, first_row + p.I + n);
        static_cast<T*>(p.hidden)[t * p.hidden_stride + n] = from_float<T>(silu(gate) * up);
      }
    });
  });
}

// Rows without an expert, one a warp.
template <class T>
__device__ void skip_rows(const MoeExpertsParams& p, int64_t first) {
  const int64_t t = first + threadIdx.x / kWarpSize;
  if (t >= p.T || (p.topk_ids[t] >= 0 && p.topk_ids[t] < p.E)) return;
  const T* x = static_cast<const T*>(p.x) + t * p.H;
  T* out = static_cast<T*>(p.out) + t * p.H;
  const float all = p.topk_ids[t] == p.E ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  const bool identity = p.skip_identity && p.topk_ids[t] == p.E;
  for (int64_t h = threadIdx.x % kWarpSize; h < p.H; h += kWarpSize)
    out[h] = from_float<T>(identity ? to_float(x[h]) * p.topk_weights[t] : all);
}

// A block: one expert and one or two panels of outputs; after those of all experts, kWarps rows each.
template <class T, class W, int kRows, bool kWhole>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kRows)) moe_experts_down_kernel(MoeExpertsParams p) {
  constexpr int kPanels = down_panels(kRows);
  using Product = BlockProduct<T, kPanels, kRows, kWarps, part_rows(kRows), W>;
  __shared__ __align__(16) float shared[Product::kFloats];
  const Product product = {shared};
  const int panels = static_cast<int>((p.H + kPanel - 1) / kPanel), strips = (panels + kPanels - 1) / kPanels;
  const int block = static_cast<int>(blockIdx.x), expert = block / strips, panel = block % strips * kPanels;
  if (expert >= p.E) return skip_rows<T>(p, (block - p.E * strips) * kWarps);
  const T* hidden = static_cast<const T*>(p.hidden);
  const auto weights =
      panels_at(W{}, p.down_proj, p.down_scales, expert * int64_t{panels} + panel, p.inner_pairs, panels - panel);
  for_rows_of<kRows>(p, expert, [&](const int32_t* rows) {
    const auto row = [&](int i) { return rows[i] < 0 ? nullptr : hidden + rows[i] * p.hidden_stride; };
    product.template multiply<kWhole>(weights, row, p.I, true, [&](int first) {
#pragma unroll 1  // the sums of the other parts are still there
      for (int at = threadIdx.x; at < part_rows(kRows) * Product::kOutputs; at += kThreads) {
        const int i = at / Product::kOutputs, c = at % Product::kOutputs, t = rows[first + i];
        const int n = panel * kPanel + c;
        if (t >= 0 && n < p.H)
          static_cast<T*>(p.out)[t * p.H + n] =
              from_float<T>(product.sum(i, c) * scale_of<W>(p.down_scales, expert * p.H + n) * p.topk_weights[t]);
      }
    });
  });
}

template <class T, class W, int kRows, bool kWhole>
void launch(const MoeExpertsParams& p, void* stream) {
  constexpr int kOutputs = down_panels(kRows) * kPanel;
  const int64_t up = (p.I + kPanel - 1) / kPanel, down = (p.H + kOutputs - 1) / kOutputs;
  const int64_t skip = (p.T + kWarps - 1) / kWarps;
  if (p.E > 0)
    BLOCKDRAFT_LAUNCH((moe_experts_up_kernel<T, W, kRows, kWhole>), dim3(p.E * up), dim3(kThreads), 0, stream, p);
  BLOCKDRAFT_LAUNCH((moe_experts_down_kernel<T, W, kRows, kWhole>), dim3(p.E * down + skip), dim3(kThreads), 0, stream,
                    p);
}

template <class W>
void launch_bfloat16(const MoeExpertsParams& p, void* stream) {
  // The shapes of real models; see is_whole in panel.cuh.
  const bool whole = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.H % (2 * kPanel) == 0 && p.I % kPanel == 0;
  if (!whole)
    launch<BFloat16, W, 16, false>(p, stream);
  else if (p.T <= kTileRows)
    launch<BFloat16, W, kTileRows, true>(p, stream);
  else if (p.T <= 64)
    launch<BFloat16, W, 16, true>(p, stream);
  else
    launch<BFloat16, W, 48, true>(p, stream);
}

}  // namespace

const char* moe_experts(const MoeExpertsParams& p, void* stream) {
  const auto with = [&](auto w) {
    if (p.dtype == DType::kFloat32)
      launch<float, decltype(w), 16, false>(p, stream);
    else
      launch_bfloat16<decltype(w)>(p, stream);
  };
  if (p.weight_dtype == DType::kInt8)
    with(Int8{});
  else if (p.weight_dtype == DType::kFloat8)
    with(Float8{});
  else if (p.weight_dtype == DType::kMxfp4)
    with(Mxfp4{});
  else if (p.dtype == DType::kFloat32)
    launch<float, float, 16, false>(p, stream);
  else
    launch_bfloat16<BFloat16>(p, stream);
  return last_error();
}

}  // namespace blockdraft::gpu
