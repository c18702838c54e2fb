#include "gpu/device/panel.cuh"
#include "ops/pack_weight.h"

namespace blockdraft::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockPairs = 32;  // 32 rows of 64 columns: two whole lines of each row at least meet in one block

// A block packs kBlockPairs pairs of a panel. Lanes read 32 rows in the same column, so it is the L1 cache that makes
// whole lines of the reads.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_weight_kernel(PackWeightParams p) {
  const int64_t panel = blockIdx.x % p.panels, matrix = blockIdx.x / p.panels;
  const int64_t half_rows = p.N / p.halves, first = panel / p.halves * kPanel;
  const T* weight = static_cast<const T*>(p.weight) + (matrix * p.N + panel % p.halves * half_rows + first) * p.K;
  T* packed = static_cast<T*>(p.packed) + blockIdx.x * p.pairs * kPair;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * kBlockPairs;
  for (int at = threadIdx.x; at < kBlockPairs * kPair; at += kThreads) {
    const int64_t c = at % kPanel, k = 2 * begin + at / kPanel;
    if (k < 2 * p.pairs)
      packed[k / 2 * kPair + in_pair<T>(c, k)] = first + c < half_rows && k < p.K ? weight[c * p.K + k] : T{};
  }
}

// Even k of a word of 8 codes.
__device__ inline uint32_t even_codes(uint32_t codes) {
  codes &= 0x0f0f0f0f;
  codes = (codes | codes >> 4) & 0x00ff00ff;
  return (codes | codes >> 8) & 0xffff;
}

// As above; a thread moves a word of 8 codes of a row.
__global__ void __launch_bounds__(kThreads) pack_mxfp4_kernel(PackWeightParams p) {
  const int64_t panel = blockIdx.x % p.panels, matrix = blockIdx.x / p.panels, words = p.K / 8;
  const int64_t half_rows = p.N / p.halves, first = panel / p.halves * kPanel;
  const auto* weight =
      static_cast<const uint32_t*>(p.weight) + (matrix * p.N + panel % p.halves * half_rows + first) * words;
  auto* packed = static_cast<uint32_t*>(p.packed) + blockIdx.x * words * kPanel;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * (kBlockPairs / 4);
  for (int at = threadIdx.x; at < kBlockPairs / 4 * kPanel; at += kThreads) {
    const int64_t c = at % kPanel, i = begin + at / kPanel;
    if (i >= words) continue;
    const uint32_t codes = first + c < half_rows ? weight[c * words + i] : 0;
    packed[i * kPanel + c] = even_codes(codes) | even_codes(codes >> 4) << 16;
  }
}

}  // namespace

const char* pack_weight(const PackWeightParams& p, void* stream) {
  if (p.E == 0) return nullptr;
  const dim3 grid(p.E * p.panels, (p.pairs + kBlockPairs - 1) / kBlockPairs);
  const auto launch = [&](auto tag) {
    BLOCKDRAFT_LAUNCH(pack_weight_kernel<decltype(tag)>, grid, dim3(kThreads), 0, stream, p);
  };
  if (p.dtype == DType::kMxfp4)
    BLOCKDRAFT_LAUNCH(pack_mxfp4_kernel, grid, dim3(kThreads), 0, stream, p);
  else if (p.dtype == DType::kInt8 || p.dtype == DType::kFloat8)
    launch(Int8{});
  else
    visit_dtype(p.dtype, launch);
  return last_error();
}

}  // namespace blockdraft::gpu
