#include "ops/reject_drafts.h"

#include "cpu/token_law.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

// In float64, where a uniform of 2^-24 times a probability is exact enough not to decide by its rounding.
bool accepts(const RejectDraftsParams& p, int64_t t, double draft_probability, double probability) {
  return p.accept_uniforms[t] * draft_probability < p.lenience[t] * probability;
}

// From the residual's mass; from the target's where none is left, since p and q differ by less than their rounding.
template <class Residual>
int32_t draw(const RejectDraftsParams& p, int64_t t, const RowLaw& target, Residual residual) {
  double* sums = p.sums + t * p.blocks;
  const double left = sum_blocks(p.V, sums, residual);
  if (left > 0) return id_at(p.V, sums, p.residual_uniforms[t] * left, residual);
  const auto weights = [&](int64_t i) { return weights_at(target, i); };
  sum_blocks(p.V, sums, weights);
  return id_at(p.V, sums, p.residual_uniforms[t] * target.total, weights);
}

int32_t decide_point_mass(const RejectDraftsParams& p, int64_t t, const RowLaw& target) {
  const int64_t draft = p.drafts[t];
  if (accepts(p, t, 1, probability(target, draft))) return p.drafts[t];
  return draw(p, t, target, [&](int64_t i) {
    Vec mass = weights_at(target, i);
    if (i <= draft && draft < i + kLanes) mass[draft - i] = 0;
    return mass;
  });
}

int32_t decide(const RejectDraftsParams& p, int64_t t, const RowLaw& target, const RowLaw& proposal) {
  if (accepts(p, t, probability(proposal, p.drafts[t]), probability(target, p.drafts[t]))) return p.drafts[t];
  // (p - q) times the total of p. Equal laws have ratio 1 and leave exactly 0, fused or not.
  const float ratio = static_cast<float>(target.total / proposal.total);
  return draw(p, t, target, [&](int64_t i) {
    const Vec difference = weights_at(target, i) - weights_at(proposal, i) * ratio;
    return difference > 0.0f ? difference : splat(0.0f);
  });
}

// -1 for a row without a law.
int32_t decide_row(const RejectDraftsParams& p, int64_t t) {
  const float* logits = p.logits + t * p.V;
  const Peak peak = peak_of(logits, p.V);
  p.logprobs[t] = peak.id < 0 ? __builtin_nanf("") : 0;
  if (peak.id < 0 || p.temperature[t] == 0) return peak.id;

  float* weights = weights_of(p, t);
  const RowLaw target = row_law(law_of(p, t), logits, p.V, peak.logit, weights);
  int32_t token = -1;
  if (p.draft_rows[t] < 0) {
    token = decide_point_mass(p, t, target);
  } else {
    const float* draft_logits = p.draft_logits + p.draft_rows[t] * p.V;
    const Peak draft_peak = peak_of(draft_logits, p.V);
    if (draft_peak.id >= 0)
      token = decide(p, t, target, row_law(law_of(p, t), draft_logits, p.V, draft_peak.logit, weights));
  }
  p.logprobs[t] = token < 0 ? __builtin_nanf("") : logprob(target, logits[token]);
  return token;
}

}  // namespace

void reject_drafts(const RejectDraftsParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) p.tokens[t] = decide_row(p, t);
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
