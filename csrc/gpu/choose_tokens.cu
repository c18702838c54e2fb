#include "gpu/device/token_law.cuh"
#include "ops/choose_tokens.h"

namespace blockdraft::gpu {
namespace {

// One block per row.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) choose_tokens_kernel(ChooseTokensParams p) {
  const int64_t t = blockIdx.x;
  const float* logits = p.logits + t * p.V;
  const Law law = law_of(p, t);
  const Peak peak = peak_of<kThreads>(logits, p.V);
  int32_t token = exists(law) ? peak.id : -1;
  float logprob_of_token = token < 0 ? __builtin_nanf("") : 0;
  if (token >= 0 && law.temperature > 0) {
    const RowLaw row = row_law<kThreads>(law, logits, p.V, peak.logit);
    // Beyond 3.4e32 a logit over a low temperature leaves float32, and only the highest has any probability.
    if (fabsf(peak.logit / law.temperature) < kInfinity)
      token = choose_kept<kThreads>(law, noise_key(p, t), logits, p.V, row.limit);
    logprob_of_token = logprob(row, logits[token]);
  }
  if (threadIdx.x == 0) {
    p.tokens[t] = token;
    p.logprobs[t] = logprob_of_token;
  }
}

}  // namespace

const char* choose_tokens(const ChooseTokensParams& p, void* stream) {
  visit_row_threads(p.V, [&](auto threads) {
    BLOCKDRAFT_LAUNCH(choose_tokens_kernel<threads()>, dim3(p.T), dim3(threads()), 0, stream, p);
  });
  return last_error();
}

}  // namespace blockdraft::gpu
