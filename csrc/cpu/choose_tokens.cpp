#include "ops/choose_tokens.h"

#include "cpu/token_law.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

void choose_row(const ChooseTokensParams& p, int64_t t) {
  const float* logits = p.logits + t * p.V;
  const Peak peak = peak_of(logits, p.V);
  p.tokens[t] = peak.id;
  p.logprobs[t] = peak.id < 0 ? __builtin_nanf("") : 0;
  if (peak.id < 0 || p.temperature[t] == 0) return;
  const RowLaw law = row_law(law_of(p, t), logits, p.V, peak.logit, weights_of(p, t));
  // Beyond 3.4e32 a logit over a low temperature leaves float32, and only the highest has any probability.
  if (__builtin_fabsf(peak.logit / law.temperature) < kInfinity) {
    float logit;
    choose_kept(law_of(p, t), noise_key(p, t), logits, p.V, law.limit, &logit, &p.tokens[t]);
  }
  p.logprobs[t] = logprob(law, logits[p.tokens[t]]);
}

}  // namespace

void choose_tokens(const ChooseTokensParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) choose_row(p, t);
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
