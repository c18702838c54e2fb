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

}  // namespace

const char* pack_weight(const PackWeightParams& p, void* stream) {
  if (p.E == 0) return nullptr;
  const dim3 grid(p.E * p.panels, (p.pairs + kBlockPairs - 1) / kBlockPairs);
  const auto launch = [&](auto tag) {
    BLOCKDRAFT_LAUNCH(pack_weight_kernel<decltype(tag)>, grid, dim3(kThreads), 0, stream, p);
  };
  if (p.dtype == DType::kInt8)
    launch(Int8{});
  else
    visit_dtype(p.dtype, launch);
  return last_error();
}

}  // namespace blockdraft::gpu
