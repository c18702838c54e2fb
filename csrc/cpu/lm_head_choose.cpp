#include "ops/lm_head_choose.h"

#include "cpu/gemm.h"
#include "cpu/gumbel.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kPartial = 5;  // maximum, sum of exp, best score, its logit, its id

NoiseKey noise_key(const LmHeadChooseParams& p, int64_t t) { return {p.seeds[t], p.samples[t], p.positions[t]}; }

Vec mask_from(Vec x, int64_t first, int64_t n) {
  for (int64_t i = 0; i < kLanes; ++i)
    if (first + i >= n) x[i] = -kInfinity;
  return x;
}

// The best of 16 scores so far; equal scores leave the lower id.
void keep_best(Vec score, Vec logit, int64_t first, float* best_score, float* best_logit, int32_t* best_id) {
  if (!(max_lanes(score) > *best_score)) return;
  for (int64_t i = 0; i < kLanes; ++i)
    if (score[i] > *best_score) {
      *best_score = score[i];
      *best_logit = logit[i];
      *best_id = static_cast<int32_t>(first + i);
    }
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
    multiply_panel(p.hidden_states, 2 * p.pairs, p.T, weight, p.pairs, [&](int64_t t, const Vec(&total)[2]) {
      add_panel(p, t, panel * kPanel, total, partial + t * kPartial);
    });
  }
}

// Floats as integers of the same order.
IntVec ordered(Vec x) {
  const IntVec bits = bits_as<IntVec>(x + 0.0f);  // -0 becomes 0
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
float from_ordered(int32_t key) { return bits_as<float>(key ^ ((key >> 31) & 0x7fffffff)); }

// Weight of the logits >= limit: their number for weights of 1, their probability otherwise.
float mass_from(const float* logits, const float* weights, int64_t n, int32_t limit) {
  Vec sum = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec weight = weights ? load(weights + i) : splat(1.0f);
    sum += ordered(load(logits + i)) >= limit ? weight : splat(0.0f);
  }
  return sum_lanes(sum);
}

// The largest limit for which mass_from reaches `wanted`: bisection over the integers behind the floats, 32 passes,
// no sorting. float32 counts are exact up to 2^24 ids a lane.
float largest_limit(const float* logits, const float* weights, int64_t n, float wanted, float floor) {
  int64_t low = ordered(splat(floor))[0], high = ordered(splat(kInfinity))[0];
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (mass_from(logits, weights, n, static_cast<int32_t>(middle)) >= wanted)
      low = middle;
    else
      high = middle - 1;
  }
  return from_ordered(static_cast<int32_t>(low));
}

// The smallest logit that top_k, top_p and min_p leave.
float kept_from(const LmHeadChooseParams& p, int64_t t, const float* logits, float highest, float* weights) {
  const int64_t n = p.panels * kPanel;
  float limit = -3.4e38f;
  if (p.top_k[t] > 0 && p.top_k[t] < p.V)
    limit = largest_limit(logits, nullptr, n, static_cast<float>(p.top_k[t]), limit);
  if (p.top_p[t] < 1) {
    for (int64_t i = 0; i < n; i += kLanes) store(weights + i, exp((load(logits + i) - highest) / p.temperature[t]));
    const float left = mass_from(logits, weights, n, ordered(splat(limit))[0]);
    limit = largest_limit(logits, weights, n, p.top_p[t] * left, limit);
  }
  if (p.min_p[t] > 0) limit = maximum(limit, highest + p.temperature[t] * log(p.min_p[t]));
  return limit;
}

void choose_truncated(const LmHeadChooseParams& p, int64_t t, float highest, float* best_logit, int32_t* best_id) {
  const int64_t n = p.panels * kPanel;
  const float* logits = p.logits + p.logits_rows[t] * n;
  const float limit = kept_from(p, t, logits, highest, p.weights + p.logits_rows[t] * n);
  float best_score = -kInfinity;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec logit = load(logits + i);
    const IntVec kept = logit >= limit;
    const Vec score = logit / p.temperature[t] + gumbel(noise_key(p, t), static_cast<uint32_t>(i));
    keep_best(kept ? score : splat(-kInfinity), logit, i, &best_score, best_logit, best_id);
  }
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
