#pragma once
// The law by which a token is drawn from one row of logits: what temperature, top_k, top_p and min_p leave, and the
// draws from it. Shared by the operators that decide tokens, so that they decide alike.
#include "cpu/gumbel.h"

namespace blockdraft::cpu {

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.40282347e38f;  // ids with a finite logit are from here up
constexpr int64_t kSumIds = 512;            // ids of a block whose sum is kept

struct Law {
  float temperature;
  int32_t top_k;
  float top_p, min_p;
};

template <class Params>
BLOCKDRAFT_INLINE Law law_of(const Params& p, int64_t t) {
  return {p.temperature[t], p.top_k[t], p.top_p[t], p.min_p[t]};
}

template <class Params>
BLOCKDRAFT_INLINE NoiseKey noise_key(const Params& p, int64_t t) {
  return {p.seeds[t], p.samples[t], p.positions[t]};
}

// Scratch of rows with top_p, nullptr for the others.
template <class Params>
BLOCKDRAFT_INLINE float* weights_of(const Params& p, int64_t t) {
  return p.weights_rows[t] < 0 ? nullptr : p.weights + p.weights_rows[t] * p.width;
}

// Logits first .. first + 15 of n; -inf past the end.
BLOCKDRAFT_INLINE Vec load_logits(const float* logits, int64_t first, int64_t n) {
  if (first + kLanes <= n) return load(logits + first);
  Vec x = splat(-kInfinity);
  for (int64_t i = 0; first + i < n; ++i) x[i] = logits[first + i];
  return x;
}

// The best of 16 scores so far; equal scores leave the lower id.
static inline void keep_best(Vec score, Vec logit, int64_t first, float* best_score, float* best_logit,
                             int32_t* best_id) {
  if (!(max_lanes(score) > *best_score)) return;
  for (int64_t i = 0; i < kLanes; ++i)
    if (score[i] > *best_score) {
      *best_score = score[i];
      *best_logit = logit[i];
      *best_id = static_cast<int32_t>(first + i);
    }
}

// Truncation.

// Floats as integers of the same order.
BLOCKDRAFT_INLINE IntVec ordered(Vec x) {
  const IntVec bits = bits_as<IntVec>(x + 0.0f);  // -0 becomes 0
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
BLOCKDRAFT_INLINE float from_ordered(int32_t key) { return bits_as<float>(key ^ ((key >> 31) & 0x7fffffff)); }

// Weight of the logits >= limit: their number for weights of 1, their probability otherwise. The tail stands apart
// because a test of the length in the loop made the truncated choice of 20,000 ids 1.6 times slower.
static inline float mass_from(const float* logits, const float* weights, int64_t n, int32_t limit) {
  const int64_t whole = n / kLanes * kLanes;
  const auto mass = [&](Vec logit, int64_t i) {
    return ordered(logit) >= limit ? (weights ? load(weights + i) : splat(1.0f)) : splat(0.0f);
  };
  Vec sum = {};
  for (int64_t i = 0; i < whole; i += kLanes) sum += mass(load(logits + i), i);
  if (whole < n) sum += mass(load_logits(logits, whole, n), whole);
  return sum_lanes(sum);
}

// The largest limit for which mass_from reaches `wanted`: bisection over the integers behind the floats, 32 passes,
// no sorting. float32 counts are exact up to 2^24 ids a lane.
static inline float largest_limit(const float* logits, const float* weights, int64_t n, float wanted, float floor) {
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

// The smallest logit that top_k, top_p and min_p leave. `weights` is scratch for top_p, n floats and up to 15 more.
static inline float kept_from(const Law& law, const float* logits, int64_t n, float highest, float* weights) {
  float limit = kLowest;
  if (law.top_k > 0 && law.top_k < n) limit = largest_limit(logits, nullptr, n, static_cast<float>(law.top_k), limit);
  if (law.top_p < 1) {
    for (int64_t i = 0; i < n; i += kLanes)
      store(weights + i, exp((load_logits(logits, i, n) - highest) / law.temperature));
    const float left = mass_from(logits, weights, n, ordered(splat(limit))[0]);
    limit = largest_limit(logits, weights, n, law.top_p * left, limit);
  }
  if (law.min_p > 0) limit = maximum(limit, highest + law.temperature * log(law.min_p));
  return limit;
}

// argmax of logit / temperature + noise over the ids whose logit is at least `limit`.
static inline void choose_kept(const Law& law, const NoiseKey& key, const float* logits, int64_t n, float limit,
                               float* best_logit, int32_t* best_id) {
  float best_score = -kInfinity;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec logit = load_logits(logits, i, n);
    const IntVec kept = logit >= limit;
    const Vec score = logit / law.temperature + gumbel(key, static_cast<uint32_t>(i));
    keep_best(kept ? score : splat(-kInfinity), logit, i, &best_score, best_logit, best_id);
  }
}

// Probabilities.

struct Peak {
  float logit;
  int32_t id;  // the lowest of equals; -1 for a row that has no law
};

// The largest of n logits. A NaN, +inf, or nothing but -inf: no law.
static inline Peak peak_of(const float* logits, int64_t n) {
  Vec highest = splat(-kInfinity);
  IntVec place = {}, bad = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = load_logits(logits, i, n);
    const IntVec higher = x > highest;
    highest = higher ? x : highest;
    place = higher ? static_cast<int32_t>(i) - IntVec{} : place;
    bad |= (x != x) | (x == kInfinity);
  }
  Peak peak = {-kInfinity, -1};
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    const int32_t id = place[lane] + lane;
    if (highest[lane] > peak.logit || (highest[lane] == peak.logit && id < peak.id)) peak = {highest[lane], id};
  }
  return any_lane(bad) ? Peak{peak.logit, -1} : peak;
}

// sums [blocks of 512 ids] = what mass(first) gives for ids first .. first + 15, added up in float64: the sums of a
// quarter million ids are compared with uniforms of 2^-24. Returns the sum of all in the order of the blocks. sums may
// be nullptr.
template <class Mass>
static inline double sum_blocks(int64_t n, double* sums, Mass mass) {
  typedef double Wide __attribute__((vector_size(128)));
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumIds) {
    Wide sum = {};
    for (int64_t i = begin; i < minimum(n, begin + kSumIds); i += kLanes) sum += __builtin_convertvector(mass(i), Wide);
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
    if (sums) sums[begin / kSumIds] = sum[0];
    total += sum[0];
  }
  return total;
}

// The id at which the running sum of mass passes `target`, which is below the total of sums. An id without mass is
// never returned: where roundings leave the block's ids below the target, its last id with mass is.
template <class Mass>
static inline int32_t id_at(int64_t n, const double* sums, double target, Mass mass) {
  int64_t block = 0;
  double below = 0;
  while (below + sums[block] <= target) below += sums[block++];
  int64_t last = -1;
  for (int64_t i = block * kSumIds; i < minimum(n, (block + 1) * kSumIds) && below <= target; i += kLanes) {
    const Vec m = mass(i);
    for (int64_t j = 0; j < kLanes && below <= target; ++j)
      if (m[j] > 0) {
        last = i + j;
        below += m[j];
      }
  }
  return static_cast<int32_t>(last);
}

// exp((logit - highest) / temperature) of the kept ids, over their sum.
struct RowLaw {
  const float* logits;
  int64_t n;
  float temperature, highest, limit;
  double total;
};

BLOCKDRAFT_INLINE Vec weights_at(const RowLaw& law, int64_t first) {
  const Vec logit = load_logits(law.logits, first, law.n);
  return logit >= law.limit ? exp((logit - law.highest) / law.temperature) : splat(0.0f);
}

BLOCKDRAFT_INLINE double probability(const RowLaw& law, int64_t id) {
  return weights_at(law, id / kLanes * kLanes)[id % kLanes] / law.total;
}

BLOCKDRAFT_INLINE float logprob(const RowLaw& law, float logit) {
  return (logit - law.highest) / law.temperature - log(static_cast<float>(law.total));
}

// Of a row with a peak. weights as kept_from wants them.
static inline RowLaw row_law(const Law& law, const float* logits, int64_t n, float highest, float* weights) {
  RowLaw row = {logits, n, law.temperature, highest, kept_from(law, logits, n, highest, weights), 0};
  row.total = sum_blocks(n, nullptr, [&](int64_t i) { return weights_at(row, i); });
  return row;
}

}  // namespace blockdraft::cpu
