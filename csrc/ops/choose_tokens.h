#pragma once
// Contract of choose_tokens: the choice of lm_head_choose (lm_head_choose.h) from logits that are there.
//
// Same meaning of every parameter, same noise, same bits of the tokens. An id with logit -inf is not allowed and never
// chosen. A row with a NaN, with +inf, or with nothing but -inf has no law: token -1, logprob NaN. On a GPU, where the
// host does not look at values, neither has a row with a temperature, top_k, top_p or min_p out of range.
//
//   logprob = log of the probability by which the token was drawn: temperature and truncations applied, over the kept
//   ids; 0 for greedy rows
#include <cstdint>

namespace blockdraft {

struct ChooseTokensParams {
  const float* logits;          // [T, V]
  const float* temperature;     // [T], 0 is greedy
  const int32_t* top_k;         // [T], 0 is off
  const float* top_p;           // [T], 1 is off
  const float* min_p;           // [T], 0 is off
  const int64_t* seeds;         // [T]
  const int32_t* samples;       // [T], sample index of a request
  const int32_t* positions;     // [T], position the token is for
  const int32_t* weights_rows;  // CPU: [T], row of weights for rows with top_p, else -1
  float* weights;               // CPU: scratch [rows with top_p, width]
  int32_t* tokens;              // [T]
  float* logprobs;              // [T]
  int64_t T, V, width;          // width: V rounded up to 16
};

namespace cpu {
// Rows [begin, end).
void choose_tokens(const ChooseTokensParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* choose_tokens(const ChooseTokensParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
