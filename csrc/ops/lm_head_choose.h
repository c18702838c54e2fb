#pragma once
// Contract of lm_head_choose: LM head and the choice of a token in one pass, without a logits tensor.
//
//   l = hidden_states weight^T                       logprob of the chosen token: l[token] - logsumexp(l)
//   temperature 0: token = argmax l                  the lowest id of equals
//   else:          token = argmax over the kept ids of l / temperature + g,   g = -log(-log(u)) of Philox bits
//
// Kept ids: the top_k largest, then the smallest set with probability >= top_p, then probability >= min_p of the
// largest; in this order, each over what the one before left. Ids whose logit equals a limit are all kept. Rows that
// use any of the three write their logits to a scratch row and are decided from there. On a GPU a row whose parameters
// no law has (which the host function of the CPU refuses) gives token -1 and NaN.
//
// The noise is a function of (seed, sample, position, token id) alone: two rows that decide the same position of the
// same sample meet the same noise, whichever step or batch they are in (arXiv 2408.07978).
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

// GPU: of a strip of neighbouring ids, for a row.
struct HeadPartial {
  uint64_t best;              // score and id of the choice (gpu/device/token_law.cuh, ranked)
  float highest, sum, logit;  // largest logit, sum of exp(logit - highest), logit of the choice
};

struct LmHeadChooseParams {
  const void* hidden_states;   // [T, H] of dtype
  const void* rows;            // CPU: hidden_states [T, 2 * pairs] as products read them (packed_linear.h)
  const void* packed;          // [panels, pairs, 64] of dtype
  const float* temperature;    // [T], 0 is greedy
  const int32_t* top_k;        // [T], 0 is off
  const float* top_p;          // [T], 1 is off
  const float* min_p;          // [T], 0 is off
  const int64_t* seeds;        // [T]
  const int32_t* samples;      // [T], sample index of a request
  const int32_t* positions;    // [T], position the token is for
  const int32_t* logits_rows;  // CPU: [T], row of logits for rows with top_k, top_p or min_p, else -1
  float* partial;              // CPU: scratch [blocks, T, 5]: maximum, sum of exp, best score, its logit, its id (bits)
  HeadPartial* head_partials;  // GPU: scratch [ceil(V / 32), T]
  float* logits;               // scratch [rows with truncation, 32 * panels]; GPU: [T, V], rows with truncation written
  float* weights;              // CPU: scratch [rows with truncation, 32 * panels]: exp of the scaled logits
  int32_t* tokens;             // [T]
  float* logprobs;             // [T]
  int64_t T, H, V, panels, pairs, blocks;
  DType dtype;
};

inline constexpr int64_t kHeadPanels = 16;  // panels of a block, whose partial results are merged in order

namespace cpu {
// Blocks [begin, end) of 512 ids.
void lm_head_choose(const LmHeadChooseParams& p, int64_t begin, int64_t end);
// Rows [begin, end): merges the blocks; decides truncated rows from their logits.
void lm_head_choose_merge(const LmHeadChooseParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* lm_head_choose(const LmHeadChooseParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
