#pragma once
// Contract of reject_drafts: speculative rejection sampling (Leviathan et al. 2022, Chen et al. 2023), a draft a row.
//
//   p = law of a row of logits, q = law of the row of draft_logits that the draft d was drawn from, both by the row's
//   temperature, top_k, top_p and min_p (lm_head_choose.h); a draft without such a row has q(d) = 1
//
//   accept uniform * q(d) < lenience * p(d):  token = d     strict, so that p(d) = 0 is never accepted
//   otherwise:                                token ~ (p - q)+, the id at which its running sum passes the residual
//                                             uniform; ~ p where nothing is left of p - q
//   temperature 0:                            token = argmax of the logits
//   logprob = log p(token)
//
// With lenience 1 the token has law p, whatever q is: min(p, q) + (p - q)+ = p.
//
// An id with logit -inf is not allowed. A row with a NaN, with +inf, or with nothing but -inf in its logits, or in
// its draft logits where they are needed, has no law: token -1, logprob NaN. On a GPU, where the host does not look at
// values, neither has a row with any value out of range.
#include <cstdint>

namespace blockdraft {

struct RejectDraftsParams {
  const float* logits;             // [T, V]
  const float* draft_logits;       // [M, V]
  const int32_t* draft_rows;       // [T], row of draft_logits, -1 for a point mass
  const int32_t* drafts;           // [T]
  const float* temperature;        // [T], 0 is greedy
  const int32_t* top_k;            // [T], 0 is off
  const float* top_p;              // [T], 1 is off
  const float* min_p;              // [T], 0 is off
  const float* lenience;           // [T], >= 1
  const float* accept_uniforms;    // [T], in [0, 1)
  const float* residual_uniforms;  // [T], in [0, 1)
  const int32_t* weights_rows;     // CPU: [T], row of weights for rows with top_p, else -1
  float* weights;                  // CPU: scratch [rows with top_p, width]
  double* sums;                    // CPU: scratch [T, blocks]: sums of 512 ids
  int32_t* tokens;                 // [T]
  float* logprobs;                 // [T]
  int64_t T, M, V, width, blocks;  // width: V rounded up to 16
};

namespace cpu {
// Rows [begin, end).
void reject_drafts(const RejectDraftsParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* reject_drafts(const RejectDraftsParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
