#pragma once
// The law by which a token is drawn from one row of logits, and the draws from it, as in csrc/cpu/token_law.h. A block
// works on one row, and all of its threads call these functions with the same arguments and get the same bits back.
//
// Sums run in an order that n decides (by row_threads), so a row has the same bits in any call. No function needs
// scratch memory: weights are computed again where they are needed.
#include <bit>
#include <cstdint>
#include <type_traits>

#include "gpu/device/gumbel.cuh"
#include "gpu/device/reduce.cuh"

namespace blockdraft::gpu {

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.40282347e38f;  // ids with a finite logit are from here up

struct Law {
  float temperature;
  int32_t top_k;
  float top_p, min_p;
};

template <class Params>
__device__ Law law_of(const Params& p, int64_t t) {
  return {p.temperature[t], p.top_k[t], p.top_p[t], p.min_p[t]};
}

template <class Params>
__device__ NoiseKey noise_key(const Params& p, int64_t t) {
  return {p.seeds[t], p.samples[t], p.positions[t]};
}

// What the host function checks on the CPU.
__device__ inline bool exists(const Law& law) {
  return (law.temperature == 0 || (law.temperature >= 1e-6f && law.temperature < kInfinity)) && law.top_k >= 0 &&
         law.top_p > 0 && law.top_p <= 1 && law.min_p >= 0 && law.min_p <= 1;
}

// Calls f with the number of threads for a row of n logits as a constant: many hide the latency of a long row's loads,
// and few are enough for a short one.
template <class F>
void visit_row_threads(int64_t n, F&& f) {
  n > 8192 ? f(std::integral_constant<int, 512>{}) : f(std::integral_constant<int, 128>{});
}

// f(logit, id) for the ids of this thread, and -inf past the end of the row. Four loads are in flight at a time, 8 KB
// for a block of 512.
template <int kThreads, class F>
__device__ void each_logit(const float* logits, int64_t n, F f) {
  for (int64_t first = threadIdx.x; first < n; first += 4 * kThreads) {
    float loaded[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) loaded[i] = first + i * kThreads < n ? logits[first + i * kThreads] : -kInfinity;
#pragma unroll
    for (int i = 0; i < 4; ++i) f(loaded[i], static_cast<int32_t>(first + i * kThreads));
  }
}

// Floats as integers of the same order.
__device__ inline int32_t ordered(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x + 0.0f);  // -0 becomes 0
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ inline float from_ordered(int32_t key) { return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff)); }

// A value and its id as one word: the larger value is the larger word, and of equals the lower id.
__device__ inline uint64_t ranked(float value, int32_t id) {
  return static_cast<uint64_t>(static_cast<uint32_t>(ordered(value)) ^ 0x80000000u) << 32 | ~static_cast<uint32_t>(id);
}
__device__ inline float value_of(uint64_t word) {
  return from_ordered(static_cast<int32_t>(static_cast<uint32_t>(word >> 32) ^ 0x80000000u));
}
__device__ inline int32_t id_of(uint64_t word) { return static_cast<int32_t>(~static_cast<uint32_t>(word)); }

struct Peak {
  float logit;
  int32_t id;  // the lowest of equals; -1 for a row that has no law
};

// The largest of n logits. A NaN, +inf, or nothing but -inf: no law.
template <int kThreads>
__device__ Peak peak_of(const float* logits, int64_t n) {
  constexpr uint64_t kBad = ~uint64_t{0};
  uint64_t best = 0;
  each_logit<kThreads>(logits, n, [&](float logit, int32_t id) {
    const uint64_t word = logit < kInfinity ? ranked(logit, id) : kBad;
    if (word > best) best = word;
  });
  best = block_max<kThreads>(best);
  const float highest = value_of(best);
  return {highest, best == kBad || highest == -kInfinity ? -1 : id_of(best)};
}

// Truncation.

struct Mass {
  float weight;
  int32_t count;
};
__device__ inline Mass operator+(Mass a, Mass b) { return {a.weight + b.weight, a.count + b.count}; }
__device__ inline Mass shuffle_xor(Mass mass, int mask) {
  return std::bit_cast<Mass>(shuffle_xor(std::bit_cast<uint64_t>(mass), mask));
}

// The largest limit, from `floor` up, for which the ids with at least that logit are `enough`; or another one that
// leaves the same ids. The integers behind the floats are searched, a quarter of the range left by each pass: 16 passes
// for equal logits, fewer as soon as a single id is in question. An id beyond the range costs a load and a comparison.
template <int kThreads, class Weight, class Enough>
__device__ float largest_limit(const float* logits, int64_t n, float floor, float highest, Weight weight,
                               Enough enough) {
  int64_t low = ordered(floor), high = ordered(highest), count_from_low = n;
  Mass above = {};  // of the ids beyond high: not enough
  while (low < high && count_from_low - above.count > 1) {
    int32_t cuts[3];
    Mass from[3] = {};  // from the cut to high
#pragma unroll
    for (int j = 0; j < 3; ++j) cuts[j] = static_cast<int32_t>(low + ((high - low + 1) * (j + 1) + 3) / 4);
    each_logit<kThreads>(logits, n, [&](float logit, int32_t) {
      const int32_t key = ordered(logit);
      if (key < cuts[0] || key > high) return;
      const Mass mass = {weight(logit), 1};
#pragma unroll
      for (int j = 0; j < 3; ++j)
        if (key >= cuts[j]) from[j] = from[j] + mass;
    });
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const Mass mass = above + block_sum<kThreads>(from[j]);
      if (!enough(mass)) {
        high = cuts[j] - 1;
        above = mass;
        break;
      }
      low = cuts[j];
      count_from_low = mass.count;
    }
  }
  return from_ordered(static_cast<int32_t>(low));
}

// The sum of f(logit) over a row, in float64: the sums of a quarter million ids are compared with uniforms of 2^-24.
template <int kThreads, class F>
__device__ double row_sum(const float* logits, int64_t n, F f) {
  double sum = 0;
  each_logit<kThreads>(logits, n, [&](float logit, int32_t) { sum += f(logit); });
  return block_sum<kThreads>(sum);
}

// The smallest logit that top_k, top_p and min_p leave.
template <int kThreads>
__device__ float kept_from(const Law& law, const float* logits, int64_t n, float highest) {
  float limit = kLowest;
  if (law.top_k > 0 && law.top_k < n)
    limit = largest_limit<kThreads>(
        logits, n, limit, highest, [](float) { return 0.0f; }, [&](Mass m) { return m.count >= law.top_k; });
  if (law.top_p < 1) {
    const auto weight = [&](float logit) { return expf((logit - highest) / law.temperature); };
    const double left = row_sum<kThreads>(logits, n, [&](float logit) { return logit >= limit ? weight(logit) : 0; });
    const float wanted = law.top_p * static_cast<float>(left);
    limit = largest_limit<kThreads>(logits, n, limit, highest, weight, [&](Mass m) { return m.weight >= wanted; });
  }
  if (law.min_p > 0) limit = fmaxf(limit, highest + law.temperature * logf(law.min_p));
  return limit;
}

// argmax of logit / temperature + noise over the ids whose logit is at least `limit`.
template <int kThreads>
__device__ int32_t choose_kept(const Law& law, const NoiseKey& key, const float* logits, int64_t n, float limit) {
  uint64_t best = 0;
  each_logit<kThreads>(logits, n, [&](float logit, int32_t id) {
    if (!(logit >= limit)) return;
    const uint64_t word = ranked(logit / law.temperature + gumbel(key, static_cast<uint32_t>(id)), id);
    if (word > best) best = word;
  });
  return id_of(block_max<kThreads>(best));
}

// Probabilities.

// exp((logit - highest) / temperature) of the kept ids, over their sum.
struct RowLaw {
  const float* logits;
  int64_t n;
  float temperature, highest, limit;
  double total;
};

__device__ inline float weight_of(const RowLaw& law, float logit) {
  return logit >= law.limit ? expf((logit - law.highest) / law.temperature) : 0;
}
__device__ inline float weight_at(const RowLaw& law, int64_t id) { return weight_of(law, law.logits[id]); }

__device__ inline double probability(const RowLaw& law, int64_t id) { return weight_at(law, id) / law.total; }

__device__ inline float logprob(const RowLaw& law, float logit) {
  return (logit - law.highest) / law.temperature - logf(static_cast<float>(law.total));
}

// Of a row with a peak.
template <int kThreads>
__device__ RowLaw row_law(const Law& law, const float* logits, int64_t n, float highest) {
  RowLaw row = {logits, n, law.temperature, highest, kept_from<kThreads>(law, logits, n, highest), 0};
  row.total = row_sum<kThreads>(logits, n, [&](float logit) { return weight_of(row, logit); });
  return row;
}

// The id at which the running sum of mass(id) passes `uniform` times the sum of all; -1 where there is no mass. Each
// warp sums its share of the ids, then the share that holds the place is divided again. An id without mass is never
// returned: where roundings leave all shares below the place, the last one with mass is taken.
template <int kThreads, class MassAt>
__device__ int32_t draw(int64_t n, float uniform, MassAt mass) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ double sums[kWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int64_t begin = 0, end = n;
  double below = 0, place = -1;
  do {
    const int64_t share = (end - begin + kWarps - 1) / kWarps, first = begin + warp * share;
    double sum = 0;
#pragma unroll 4
    for (int64_t id = first + lane; id < first + share && id < end; id += kWarpSize) sum += mass(id);
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (place < 0) {
      double total = 0;
      for (int i = 0; i < kWarps; ++i) total += sums[i];
      place = uniform * total;
    }
    int chosen = -1;
    for (int i = 0; i < kWarps && !(chosen >= 0 && below + sums[chosen] > place); ++i) {
      if (!(sums[i] > 0)) continue;
      if (chosen >= 0) below += sums[chosen];
      chosen = i;
    }
    __syncthreads();  // so that sums may be written again
    if (chosen < 0) return -1;
    begin += chosen * share;
    if (begin + share < end) end = begin + share;
  } while (end - begin > 1);
  return static_cast<int32_t>(begin);
}

}  // namespace blockdraft::gpu
