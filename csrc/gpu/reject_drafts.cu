#include "gpu/device/token_law.cuh"
#include "ops/reject_drafts.h"

namespace blockdraft::gpu {
namespace {

// What the host function checks on the CPU.
__device__ bool is_in_range(const RejectDraftsParams& p, int64_t t) {
  const auto is_uniform = [](float x) { return x >= 0 && x < 1; };
  return exists(law_of(p, t)) && p.drafts[t] >= 0 && p.drafts[t] < p.V && p.draft_rows[t] >= -1 &&
         p.draft_rows[t] < p.M && p.lenience[t] >= 1 && p.lenience[t] < kInfinity && is_uniform(p.accept_uniforms[t]) &&
         is_uniform(p.residual_uniforms[t]);
}

// In float64, where a uniform of 2^-24 times a probability is exact enough not to decide by its rounding.
__device__ bool accepts(const RejectDraftsParams& p, int64_t t, double draft_probability, double probability) {
  return p.accept_uniforms[t] * draft_probability < p.lenience[t] * probability;
}

// From the residual's mass; from the target's where none is left, since p and q differ by less than their rounding.
template <int kThreads, class Residual>
__device__ int32_t draw_rest(const RejectDraftsParams& p, int64_t t, const RowLaw& target, Residual residual) {
  const int32_t token = draw<kThreads>(p.V, p.residual_uniforms[t], residual);
  if (token >= 0) return token;
  return draw<kThreads>(p.V, p.residual_uniforms[t], [&](int64_t id) { return weight_at(target, id); });
}

template <int kThreads>
__device__ int32_t decide_point_mass(const RejectDraftsParams& p, int64_t t, const RowLaw& target) {
  const int32_t draft = p.drafts[t];
  if (accepts(p, t, 1, probability(target, draft))) return draft;
  return draw_rest<kThreads>(p, t, target, [&](int64_t id) { return id == draft ? 0 : weight_at(target, id); });
}

template <int kThreads>
__device__ int32_t decide(const RejectDraftsParams& p, int64_t t, const RowLaw& target, const RowLaw& proposal) {
  const int32_t draft = p.drafts[t];
  if (accepts(p, t, probability(proposal, draft), probability(target, draft))) return draft;
  // (p - q) times the total of p. Equal laws have ratio 1 and leave exactly 0, fused or not.
  const float ratio = static_cast<float>(target.total / proposal.total);
  return draw_rest<kThreads>(p, t, target, [&](int64_t id) {
    const float difference = weight_at(target, id) - weight_at(proposal, id) * ratio;
    return difference > 0 ? difference : 0;
  });
}

// Of a row that has a law and is not greedy; -1 where the draft's row has none.
template <int kThreads>
__device__ int32_t decide_row(const RejectDraftsParams& p, int64_t t, const RowLaw& target) {
  if (p.draft_rows[t] < 0) return decide_point_mass<kThreads>(p, t, target);
  const float* draft_logits = p.draft_logits + p.draft_rows[t] * p.V;
  const Peak peak = peak_of<kThreads>(draft_logits, p.V);
  if (peak.id < 0) return -1;
  return decide<kThreads>(p, t, target, row_law<kThreads>(law_of(p, t), draft_logits, p.V, peak.logit));
}

// One block per row.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) reject_drafts_kernel(RejectDraftsParams p) {
  const int64_t t = blockIdx.x;
  const float* logits = p.logits + t * p.V;
  const Peak peak = peak_of<kThreads>(logits, p.V);
  int32_t token = is_in_range(p, t) ? peak.id : -1;
  float logprob_of_token = 0;
  if (token >= 0 && p.temperature[t] > 0) {
    const RowLaw target = row_law<kThreads>(law_of(p, t), logits, p.V, peak.logit);
    token = decide_row<kThreads>(p, t, target);
    if (token >= 0) logprob_of_token = logprob(target, logits[token]);
  }
  if (threadIdx.x == 0) {
    p.tokens[t] = token;
    p.logprobs[t] = token < 0 ? __builtin_nanf("") : logprob_of_token;
  }
}

}  // namespace

const char* reject_drafts(const RejectDraftsParams& p, void* stream) {
  visit_row_threads(p.V, [&](auto threads) {
    BLOCKDRAFT_LAUNCH(reject_drafts_kernel<threads()>, dim3(p.T), dim3(threads()), 0, stream, p);
  });
  return last_error();
}

}  // namespace blockdraft::gpu
