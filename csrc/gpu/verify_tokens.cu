#include "gpu/device/compat.h"
#include "ops/verify_tokens.h"

namespace blockdraft::gpu {
namespace {

constexpr int kThreads = 128;

// One thread per sequence: a block has 16 rows or so.
__global__ void __launch_bounds__(kThreads) verify_tokens_kernel(VerifyTokensParams p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= p.B) return;
  const int64_t first = p.cu_rows[b], end = p.cu_rows[b + 1], length = p.verify_lengths[b];
  const bool exists = first >= 0 && end <= p.T && length <= end - first;
  const int64_t drafts = exists ? length - 1 : -1;  // below 0: nothing to keep
  int64_t accepted = 0;
  while (accepted < drafts && p.token_ids[first + accepted + 1] == p.chosen[first + accepted]) ++accepted;
  int64_t committed = drafts < 0 || p.limits[b] < 0 ? 0 : p.limits[b];
  if (accepted + 1 < committed) committed = accepted + 1;
  p.accepted[b] = static_cast<int32_t>(accepted);
  p.committed[b] = static_cast<int32_t>(committed);
  p.commit_rows[b] = committed > 0 ? static_cast<int32_t>(first + committed - 1) : -1;
  p.next_tokens[b] = committed > 0 ? p.chosen[first + committed - 1] : -1;
}

}  // namespace

const char* verify_tokens(const VerifyTokensParams& p, void* stream) {
  if (p.B == 0) return nullptr;
  BLOCKDRAFT_LAUNCH(verify_tokens_kernel, dim3((p.B + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, p);
  return last_error();
}

}  // namespace blockdraft::gpu
