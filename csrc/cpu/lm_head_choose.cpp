#include "ops/lm_head_choose.h"

#include "cpu/gemm.h"
#include "cpu/token_law.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

constexpr int64_t kPartial = 5;  // maximum, sum of exp, best score, its logit, its id

Vec mask_from(Vec x, int64_t first, int64_t n) {
  for (int64_t i = 0; i < kLanes; ++i)
    if (first + i >= n) x[i] = -kInfinity;
  return x;
}

void start_row(float* partial) {
  const int32_t id = 0;
  partial[0] = partial[2] = partial[3] = -kInfinity;
  partial[1] = 0;
  __builtin_memcpy(partial + 4, &id, sizeof id);
}

// 32 logits of one row into its running log-sum-exp and choice.
void add_panel(const LmHeadChooseParams& p, int64_t t, int64_t first, const Vec (&total)[2], float* partial) {
  const Vec logit[2] = {mask_from(total[0], first, p.V), mask_from(total[1], first + kLanes, p.V)};
  const float highest = maximum(partial[0], maximum(max_lanes(logit[0]), max_lanes(logit[1])));
  if (highest != -kInfinity) {
    const Vec sum = exp(logit[0] - highest) + exp(logit[1] - highest);
    partial[1] = partial[1] * exp(partial[0] - highest) + sum_lanes(sum);
    partial[0] = highest;
  }
  if (p.logits_rows[t] >= 0) {
    float* logits = p.logits + p.logits_rows[t] * p.panels * kPanel + first;
    store(logits, logit[0]);
    store(logits + kLanes, logit[1]);
    return;
  }
  int32_t id;
  __builtin_memcpy(&id, partial + 4, sizeof id);
  for (int64_t j = 0; j < 2; ++j) {
    Vec score = logit[j];
    if (p.temperature[t] > 0)
      score = score / p.temperature[t] + gumbel(noise_key(p, t), static_cast<uint32_t>(first + j * kLanes));
    keep_best(score, logit[j], first + j * kLanes, partial + 2, partial + 3, &id);
  }
  __builtin_memcpy(partial + 4, &id, sizeof id);
}

template <class W>
void head_block(const LmHeadChooseParams& p, int64_t block) {
  float* partial = p.partial + block * p.T * kPartial;
  for (int64_t t = 0; t < p.T; ++t) start_row(partial + t * kPartial);
  for (int64_t panel = block * kHeadPanels; panel < minimum(p.panels, (block + 1) * kHeadPanels); ++panel) {
    const W* weight = static_cast<const W*>(p.packed) + panel * p.pairs * kPair;
    multiply_panel(
        static_cast<const RowOf<W>*>(p.rows), 2 * p.pairs, p.T, weight, p.pairs,
        [&](int64_t t, const Vec(&total)[2]) { add_panel(p, t, panel * kPanel, total, partial + t * kPartial); });
  }
}

void choose_truncated(const LmHeadChooseParams& p, int64_t t, float highest, float* best_logit, int32_t* best_id) {
  const int64_t n = p.panels * kPanel;
  const float* logits = p.logits + p.logits_rows[t] * n;
  const float limit = kept_from(law_of(p, t), logits, n, highest, p.weights + p.logits_rows[t] * n);
  choose_kept(law_of(p, t), noise_key(p, t), logits, n, limit, best_logit, best_id);
}

void merge_row(const LmHeadChooseParams& p, int64_t t) {
  float highest = -kInfinity, sum = 0, best_score = -kInfinity, best_logit = -kInfinity;
  int32_t best_id = 0;
  for (int64_t block = 0; block < p.blocks; ++block)
    highest = maximum(highest, p.partial[(block * p.T + t) * kPartial]);
  for (int64_t block = 0; block < p.blocks; ++block) {
    const float* partial = p.partial + (block * p.T + t) * kPartial;
    if (partial[0] != -kInfinity) sum += partial[1] * exp(partial[0] - highest);
    if (partial[2] > best_score) {
      best_score = partial[2];
      best_logit = partial[3];
      __builtin_memcpy(&best_id, partial + 4, sizeof best_id);
    }
  }
  if (p.logits_rows[t] >= 0) choose_truncated(p, t, highest, &best_logit, &best_id);
  p.tokens[t] = best_id;
  p.logprobs[t] = best_logit - (highest + log(sum));
}

}  // namespace

void lm_head_choose(const LmHeadChooseParams& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    if (p.dtype == DType::kBFloat16)
      head_block<BFloat16>(p, block);
    else
      head_block<float>(p, block);
  }
}

void lm_head_choose_merge(const LmHeadChooseParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) merge_row(p, t);
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
