#include "gpu/device/panel.cuh"
#include "ops/packed_embedding.h"

namespace blockdraft::gpu {
namespace {

constexpr int kThreads = 256;

// One block per row.
template <class T>
__global__ void __launch_bounds__(kThreads) packed_embedding_kernel(PackedEmbeddingParams p) {
  const int64_t id = p.token_ids[blockIdx.x];
  const bool exists = id >= 0 && id < p.V;
  const T* panel = static_cast<const T*>(p.packed) + (exists ? id : 0) / kPanel * p.pairs * kPair;
  T* out = static_cast<T*>(p.out) + blockIdx.x * p.H;
  if (blockIdx.x == 0)
    for (int64_t i = threadIdx.x; i < p.arrival_count; i += kThreads) p.arrivals[i] = 0;
  for (int64_t k = threadIdx.x; k < p.H; k += kThreads)
    out[k] = exists ? panel[k / 2 * kPair + in_pair<T>(id % kPanel, k)] : T{};
}

}  // namespace

const char* packed_embedding(const PackedEmbeddingParams& p, void* stream) {
  if (p.T == 0) return nullptr;
  visit_dtype(p.dtype, [&](auto tag) {
    BLOCKDRAFT_LAUNCH(packed_embedding_kernel<decltype(tag)>, dim3(p.T), dim3(kThreads), 0, stream, p);
  });
  return last_error();
}

}  // namespace blockdraft::gpu
