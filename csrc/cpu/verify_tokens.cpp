#include "ops/verify_tokens.h"

#include "cpu/simd.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {

void verify_tokens(const VerifyTokensParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int32_t first = p.cu_rows[b], drafts = p.verify_lengths[b] - 1, limit = drafts < 0 ? 0 : p.limits[b];
    int32_t accepted = 0;
    while (accepted < drafts && p.token_ids[first + accepted + 1] == p.chosen[first + accepted]) ++accepted;
    const int32_t committed = limit <= 0 ? 0 : accepted + 1 < limit ? accepted + 1 : limit;
    p.accepted[b] = accepted;
    p.committed[b] = committed;
    p.commit_rows[b] = committed > 0 ? first + committed - 1 : -1;
    p.next_tokens[b] = committed > 0 ? p.chosen[first + committed - 1] : -1;
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
