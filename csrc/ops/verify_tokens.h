#pragma once
// Contract of verify_tokens: how many rows of each sequence's block are committed, and what comes next.
//
// The first rows of sequence b, verify_lengths[b] of them, are its anchor and drafts; chosen[r] is the token that row r
// decides for the position after it. Draft i (row i) is accepted while it equals chosen of the row before. All of
//
//   accepted = number of accepted drafts, committed = min(accepted + 1, limits), next = chosen of the last committed
//   row
//
// stay on the device. limits[b] = 0 commits nothing: the sequence is left as it was. On a GPU, where the host does not
// look at values, a sequence whose rows are not rows of the call has nothing to keep.
#include <cstdint>

namespace blockdraft {

struct VerifyTokensParams {
  const int32_t* token_ids;       // [T]
  const int32_t* chosen;          // [T]
  const int32_t* cu_rows;         // [B + 1], first row of each sequence
  const int32_t* verify_lengths;  // [B], 1 + drafts; 0: nothing to keep
  const int32_t* limits;          // [B], most rows to commit
  int32_t* accepted;              // [B]
  int32_t* committed;             // [B]
  int32_t* commit_rows;           // [B], last committed row, -1 for none
  int32_t* next_tokens;           // [B], -1 for none
  int64_t T, B;
};

namespace cpu {
// Sequences [begin, end).
void verify_tokens(const VerifyTokensParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* verify_tokens(const VerifyTokensParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
