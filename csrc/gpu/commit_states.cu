#include "gpu/device/compat.h"
#include "ops/commit_states.h"

namespace blockdraft::gpu {
namespace {

constexpr int kThreads = 256;

// One block per layer and sequence.
template <class T>
__global__ void __launch_bounds__(kThreads) commit_states_kernel(CommitStatesParams p) {
  const int64_t layer = blockIdx.x / p.B, b = blockIdx.x % p.B, row = p.commit_rows[b], slot = p.state_slots[b];
  if (row < 0 || row >= p.T || slot < 0 || slot >= p.S) return;
  const int64_t parent = p.row_parents[row];
  if (parent < -1 || parent >= p.T) return;

  const T* qkv = static_cast<const T*>(p.qkv) + layer * p.T * p.width;
  const T* own = qkv + row * p.width;
  T* older = static_cast<T*>(p.conv_states) + (layer * p.S + slot) * 2 * p.C;
  T* newer = older + p.C;
  T* recurrent = static_cast<T*>(p.recurrent_states) + (layer * p.S + slot) * p.delayed;
  for (int64_t c = threadIdx.x; c < p.C; c += kThreads) {
    older[c] = parent < 0 ? newer[c] : qkv[parent * p.width + c];
    newer[c] = own[c];
  }
  for (int64_t d = threadIdx.x; d < p.delayed; d += kThreads) recurrent[d] = own[p.C + p.delayed + d];
}

}  // namespace

const char* commit_states(const CommitStatesParams& p, void* stream) {
  if (p.L * p.B == 0) return nullptr;
  visit_dtype(p.dtype, [&](auto tag) {
    BLOCKDRAFT_LAUNCH(commit_states_kernel<decltype(tag)>, dim3(p.L * p.B), dim3(kThreads), 0, stream, p);
  });
  return last_error();
}

}  // namespace blockdraft::gpu
