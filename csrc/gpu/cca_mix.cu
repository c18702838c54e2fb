#include "gpu/device/pages.cuh"
#include "gpu/device/panel.cuh"
#include "gpu/device/reduce.cuh"
#include "ops/cca_mix.h"

namespace blockdraft::gpu {
namespace {

constexpr int kRows = 16;                        // rows of a block
constexpr int kMaxHead = 256;                    // head dimensions a block has room for
constexpr int kWarps = kWarpSize == 32 ? 8 : 4;  // as many as loads side by side cover kMaxHead outputs
constexpr int kThreads = kWarps * kWarpSize;
constexpr float kNormFloor = 1.1920929e-7f;  // as transformers in float32: a zero head stays zero
static_assert(kWarps * kWarpPanels * kPanel == kMaxHead);

// The float32 rows m' | m meet weights in bfloat16 as two bfloat16 parts, which are further rows of the product: what
// they lose is 2^-16 of m, a 256th of what rounding the result may take.
template <class T>
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;

// Sums of a warp, over steps in turn. In float32 a single chain over the 512 k of the largest head would be off by 1.8
// times what PyTorch is.
template <class T>
constexpr int kChains = sizeof(T) == 2 ? 1 : 2;

// Shared memory holds the rows first and then each warp's sums.
template <class T>
struct Layout {
  static constexpr int kPartRows = kRows * kParts<T>;
  static constexpr int kOutputs = kWarpPanels * kPanel;  // of a warp

  // 2 D rounded to an odd multiple of 32: 16-byte loads of two neighbouring rows in bfloat16 meet different banks.
  __host__ __device__ static int stride(int64_t D) { return static_cast<int>(2 * D + 31) / 64 * 64 + 32; }

  static size_t bytes(int64_t D) {  // 32 KB at D = 128, so that a CU of 64 KB has room for two blocks
    const size_t rows = kPartRows * stride(D) * sizeof(T), sums = kWarps * kPartRows * kOutputs * sizeof(float);
    return rows > sums ? rows : sums;
  }
};

// u of a row's ancestors: the parent's row, or the committed state; nullptr, for zeros, where that does not exist.
template <class T>
struct Ancestors {
  const T *parent, *grandparent;

  __device__ Ancestors(const CcaMixParams& p, int64_t row) {
    const int64_t C = (p.Hq + p.Hkv) * p.D, width = C + p.Hkv * p.D, slot = p.row_states[row];
    const T* qkv = static_cast<const T*>(p.qkv);
    const bool exists = slot >= 0 && slot < p.S;
    const T* older = exists ? static_cast<const T*>(p.conv_states) + slot * 2 * C : nullptr;
    const T* newer = exists ? older + C : nullptr;
    const int64_t parent_row = parent_of(p, row);
    const int64_t grandparent_row = parent_row < 0 ? -1 : parent_of(p, parent_row);
    parent = parent_row < 0 ? newer : qkv + parent_row * width;
    grandparent = grandparent_row >= 0 ? qkv + grandparent_row * width : parent_row < 0 ? older : newer;
  }

  __device__ static int64_t parent_of(const CcaMixParams& p, int64_t row) {
    const int64_t parent = p.row_parents[row];
    return parent < p.T ? parent : -1;
  }
};

template <class T>
__device__ float2 load_pair_or_zeros(const T* row, int64_t d) {
  return row ? load_pair(row + d) : float2{0, 0};
}

__device__ inline void store_parts(float* row, int64_t, float2 m) { store_pair(row, m); }
__device__ inline void store_parts(BFloat16* row, int64_t to_low, float2 m) {
  const uint32_t high = pack_bfloat16(m.x, m.y);
  const float2 rounded = unpack_bfloat16(high);
  *reinterpret_cast<uint32_t*>(row) = high;
  store_pair(row + to_low, float2{m.x - rounded.x, m.y - rounded.y});
}

// m' and m of one head beside each other: the rows that the grouped convolution's matrix reads.
template <class T>
__device__ void mix_depthwise(const CcaMixParams& p, int64_t head, int64_t first_row, T* rows, int stride) {
  constexpr int kRowThreads = kThreads / kRows;
  const int i = threadIdx.x / kRowThreads;
  if (first_row + i >= p.T) return;
  const int64_t C = (p.Hq + p.Hkv) * p.D, row = first_row + i, first = head * p.D;
  const T* u = static_cast<const T*>(p.qkv) + row * (C + p.Hkv * p.D);
  const Ancestors<T> before(p, row);
  const float *older = p.conv_qk_depthwise, *newer = older + C, *bias = p.conv_depthwise_bias;
#pragma unroll 4
  for (int64_t d = threadIdx.x % kRowThreads * 2; d < p.D; d += 2 * kRowThreads) {
    const float2 u0 = load_pair(u + first + d), u1 = load_pair_or_zeros(before.parent, first + d),
                 u2 = load_pair_or_zeros(before.grandparent, first + d);
    const float2 w0 = load_pair(older + first + d), w1 = load_pair(newer + first + d), b = load_pair(bias + first + d);
    T* out = rows + i * stride + d;
    store_parts(out, kRows * stride, float2{w0.x * u2.x + w1.x * u1.x + b.x, w0.y * u2.y + w1.y * u1.y + b.y});
    store_parts(out + p.D, kRows * stride, float2{w0.x * u1.x + w1.x * u0.x + b.x, w0.y * u1.y + w1.y * u0.y + b.y});
  }
}

// The mean of the raw projections that belongs to output d of a head.
template <class T>
__device__ float mean_of(const CcaMixParams& p, int64_t head, const T* u, int64_t d) {
  const int G = static_cast<int>(p.Hq / p.Hkv);
  const T* keys = u + p.Hq * p.D;
  if (head < p.Hq) return 0.5f * (to_float(u[head * p.D + d]) + to_float(keys[static_cast<int>(head) / G * p.D + d]));
  const int64_t h = head - p.Hq;
  float sum = 0;
  for (int64_t j = 0; j < G; ++j) sum += 0.5f * (to_float(u[(h * G + j) * p.D + d]) + to_float(keys[h * p.D + d]));
  return sum / static_cast<float>(G);
}

// The warps' sums of the grouped convolution: loads side by side cover the outputs, further warps share the steps.
template <class T>
struct Convolved {
  static constexpr int kOutputs = Layout<T>::kOutputs, kPartRows = Layout<T>::kPartRows;

  float* shared;
  int loads, splits;

  __device__ float* of_warp(int warp) const { return shared + warp * kPartRows * kOutputs; }

  __device__ float sum(int i, int d) const {
    float total = 0;
    for (int split = 0; split < splits; ++split)
#pragma unroll
      for (int part = 0; part < kParts<T>; ++part)
        total += of_warp(split * loads + d / kOutputs)[(part * kRows + i) * kOutputs + d % kOutputs];
    return total;
  }

  // Where the first of the numbers that sum() adds lay: room for the result.
  __device__ float& result(int i, int d) const { return of_warp(d / kOutputs)[i * kOutputs + d % kOutputs]; }
};

template <class T>
__device__ void convolve(const CcaMixParams& p, const T* weight, const T* rows, int stride, const Convolved<T>& out) {
  const int panels = static_cast<int>(panels_of(p.D)), warp = threadIdx.x / kWarpSize;
  const int panel = warp % out.loads * kWarpPanels;
  const Panels<T> weights = {weight + panel * p.D * kPair, p.D, panels - panel};
  PanelSums<T, kWarpPanels, Layout<T>::kPartRows> sums[kChains<T>];
  if (warp < out.loads * out.splits)
#pragma unroll
    for (int chain = 0; chain < kChains<T>; ++chain)
      sums[chain].template add<false>(
          weights, [&](int i) { return rows + i * stride; }, 2 * p.D, true, warp / out.loads + chain * out.splits,
          kChains<T> * out.splits);
  __syncthreads();  // the sums take the place of the rows
  float* own = out.of_warp(warp);
#pragma unroll
  for (int chain = 0; chain < kChains<T>; ++chain)
    sums[chain].each([&](int i, int c, const float4& four) {
      float4& sum = *reinterpret_cast<float4*>(own + i * Convolved<T>::kOutputs + c);
      sum = chain == 0 ? four : float4{sum.x + four.x, sum.y + four.y, sum.z + four.z, sum.w + four.w};
    });
  __syncthreads();
}

// Sine and cosine for angles up to the longest context: sinf and cosf reduce those above 105615 by a slow path through
// local memory. The rest after quarter turns is at most pi / 4 and exact to 1e-11; the series end at its 9th power.
__device__ inline float2 cosine_and_sine(float angle) {
  const double turns = rint(angle * 0.63661977236758134);
  const float x = static_cast<float>(angle - turns * 1.5707963267948966), t = x * x;
  const float cosine = 1 + t * (-1.0f / 2 + t * (1.0f / 24 + t * (-1.0f / 720 + t * (1.0f / 40320))));
  const float sine = x + x * t * (-1.0f / 6 + t * (1.0f / 120 + t * (-1.0f / 5040 + t * (1.0f / 362880))));
  const int quarter = static_cast<int>(turns) & 3;
  const float a = quarter % 2 ? sine : cosine, b = quarter % 2 ? cosine : sine;
  return float2{quarter == 1 || quarter == 2 ? -a : a, quarter >= 2 ? -b : b};
}

// Means, norm and rotation of row i by one warp. A lane has both elements of a rotated pair, so it reads what it wrote.
template <class T>
__device__ void finish_row(const CcaMixParams& p, int64_t head, int64_t row, int i, const Convolved<T>& y) {
  const T* u = static_cast<const T*>(p.qkv) + row * (p.Hq + 2 * p.Hkv) * p.D;
  const float* bias = p.conv_grouped_bias + head * p.D;
  const int half = static_cast<int>(p.half_rotary), D = static_cast<int>(p.D), lane = threadIdx.x % kWarpSize;
  float squares = 0;
  const auto complete = [&](int d) {
    const float x = y.sum(i, d) + bias[d] + mean_of(p, head, u, d);
    y.result(i, d) = x;
    squares += x * x;
  };
  for (int d = lane; d < D - half; d += kWarpSize) {
    if (d < half) complete(d);
    complete(half + d);
  }
  const float scale = head < p.Hq ? 1.0f : p.temp[head - p.Hq];
  const float factor = sqrtf(static_cast<float>(D)) / fmaxf(sqrtf(warp_sum(squares)), kNormFloor) * scale;
  for (int d = lane; d < D - half; d += kWarpSize) {
    const float high = y.result(i, half + d) * factor;
    y.result(i, half + d) = high;
    if (d >= half) continue;
    const float low = y.result(i, d) * factor;
    const float2 turn = cosine_and_sine(static_cast<float>(p.row_positions[row]) * p.inverse_frequencies[d]);
    y.result(i, d) = low * turn.x - high * turn.y;
    y.result(i, half + d) = high * turn.x + low * turn.y;
  }
}

// The tile of the pages that a row's key belongs to, nullptr for none, and the key's place in it.
template <class T>
__device__ T* find_tile(const CcaMixParams& p, void* pages, int64_t tile_size, int64_t row, int64_t h, int* slot) {
  const int64_t at = p.row_slots[row];
  if (at < 0 || at >= p.N * p.page_size) return nullptr;
  const uint32_t tile = static_cast<uint32_t>(at / kTileKeys), tiles = static_cast<uint32_t>(p.page_size / kTileKeys);
  *slot = static_cast<int>(at % kTileKeys);
  return static_cast<T*>(pages) + ((tile / tiles * p.Hkv + h) * tiles + tile % tiles) * tile_size;
}

template <class T>
__device__ void store_rows(const CcaMixParams& p, int64_t head, int64_t first, int rows, const Convolved<T>& y) {
  const int64_t heads = head < p.Hq ? p.Hq : p.Hkv, h = head < p.Hq ? head : head - p.Hq;
  T* out = static_cast<T*>(head < p.Hq ? p.q : p.k) + (first * heads + h) * p.D;
  const int pairs = static_cast<int>(p.D) / 2;
  for (int at = threadIdx.x; at < rows * pairs; at += kThreads) {
    const int i = at / pairs, d = at % pairs * 2;
    store_pair(out + i * heads * p.D + d, load_pair(&y.result(i, d)));
  }
  if (head < p.Hq) return;
  for (int at = threadIdx.x; at < kRows * pairs; at += kThreads) {  // keys of one tile lie beside each other
    const int i = at % kRows, d = at / kRows * 2;
    int slot;
    T* tile = i < rows ? find_tile<T>(p, p.k_pages, key_tile_size(p.D), first + i, h, &slot) : nullptr;
    if (tile) store_key_pair(tile, slot, d, load_pair(&y.result(i, d)));
  }
}

// V of one head, which is v_current of the row or v_delayed of its parent.
template <class T>
__device__ void store_values(const CcaMixParams& p, int64_t h, int64_t first, int rows) {
  const int64_t C = (p.Hq + p.Hkv) * p.D, width = C + p.Hkv * p.D, half = p.Hkv * p.D / 2;
  const T* qkv = static_cast<const T*>(p.qkv);
  const int D = static_cast<int>(p.D);
  for (int at = threadIdx.x; at < rows * D; at += kThreads) {
    const int64_t row = first + at / D, d = at % D, c = h * D + d, state = p.row_states[row];
    const int64_t parent = Ancestors<T>::parent_of(p, row);
    T value = from_float<T>(0);
    if (c < half)
      value = qkv[row * width + C + c];
    else if (parent >= 0)
      value = qkv[parent * width + C + c];
    else if (state >= 0 && state < p.S)
      value = static_cast<const T*>(p.recurrent_states)[state * half + c - half];
    static_cast<T*>(p.v)[row * 2 * half + c] = value;
    int slot;
    T* tile = find_tile<T>(p, p.v_pages, value_tile_size(p.D), row, h, &slot);
    if (tile) tile[value_place<T>(slot, d)] = value;
  }
}

// A block takes kRows rows of one head: of a query or key, and behind those of a value. Blocks of the same head are
// neighbours: the first one that reads a weight leaves it in the L2 cache for the others.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) cca_mix_kernel(CcaMixParams p) {
  BLOCKDRAFT_DYNAMIC_SHARED(float, shared);
  const unsigned tiles = static_cast<unsigned>((p.T + kRows - 1) / kRows);
  const int64_t head = blockIdx.x / tiles, first = blockIdx.x % tiles * int64_t{kRows};
  const int rows = static_cast<int>(p.T - first < kRows ? p.T - first : kRows);
  if (head >= p.Hq + p.Hkv) return store_values<T>(p, head - p.Hq - p.Hkv, first, rows);

  // The weights come from far: they start on their way before the rows, which the L2 cache has, are mixed.
  const int64_t size = panels_of(p.D) * p.D * kPair;
  const T* weight = static_cast<const T*>(p.conv_qk_grouped) + head * size;
  constexpr int kLine = 128 / sizeof(T);
  for (int64_t at = threadIdx.x * kLine; at < size; at += kThreads * kLine) prefetch_l2(weight + at);

  T* mixed = reinterpret_cast<T*>(shared);
  const int stride = Layout<T>::stride(p.D), loads = static_cast<int>((panels_of(p.D) + kWarpPanels - 1) / kWarpPanels);
  mix_depthwise(p, head, first, mixed, stride);
  __syncthreads();
  const Convolved<T> y = {shared, loads, kWarps / loads};
  convolve(p, weight, mixed, stride, y);
  for (int i = threadIdx.x / kWarpSize; i < rows; i += kWarps) finish_row(p, head, first + i, i, y);
  __syncthreads();
  store_rows(p, head, first, rows, y);
}

}  // namespace

const char* cca_mix(const CcaMixParams& p, void* stream) {
  const int64_t blocks = (p.Hq + 2 * p.Hkv) * ((p.T + kRows - 1) / kRows);
  visit_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    BLOCKDRAFT_LAUNCH(cca_mix_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), Layout<T>::bytes(p.D),
                      stream, p);
  });
  return last_error();
}

}  // namespace blockdraft::gpu
