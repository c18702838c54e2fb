#include "gpu/device/panel.cuh"
#include "gpu/device/token_law.cuh"
#include "ops/lm_head_choose.h"

namespace blockdraft::gpu {
namespace {

constexpr int kWarps = kWarpSize == 32 ? 8 : 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int64_t kStrip = kWarpSize;  // ids of a block: a lane each

__device__ bool is_truncated(const Law& law, int64_t V) {
  return law.temperature > 0 && ((law.top_k > 0 && law.top_k < V) || law.top_p < 1 || law.min_p > 0);
}

// What a strip has for row t, of which this lane holds the logit of `id`. A warp.
__device__ void store_partial(const LmHeadChooseParams& p, int64_t t, int64_t id, float logit) {
  const Law law = law_of(p, t);
  const bool exists = id < p.V;
  if (exists && is_truncated(law, p.V)) p.logits[t * p.V + id] = logit;
  float score = logit;
  if (law.temperature > 0) score = logit / law.temperature + gumbel(noise_key(p, t), static_cast<uint32_t>(id));
  const uint64_t word = exists ? ranked(score, static_cast<int32_t>(id)) : 0;
  const uint64_t best = warp_reduce(word, [](uint64_t a, uint64_t b) { return a < b ? b : a; });
  const float highest = warp_reduce(exists ? logit : -kInfinity, [](float a, float b) { return fmaxf(a, b); });
  const float sum = warp_sum(exists ? expf(logit - highest) : 0);
  if (word == best) p.head_partials[id / kStrip * p.T + t] = {best, highest, sum, logit};  // ids differ: one lane
}

// A block: kStrip ids and kRows rows. Blocks with the same ids are neighbours, as in packed_linear.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 2) lm_head_choose_kernel(LmHeadChooseParams p) {
  using Product = BlockProduct<T, kWarpPanels, kRows, kWarps>;
  __shared__ __align__(16) float shared[Product::kFloats];
  const int64_t chunks = (p.T + kRows - 1) / kRows;
  const int64_t panel = blockIdx.x / chunks * kWarpPanels, first = blockIdx.x % chunks * kRows;
  const T* x = static_cast<const T*>(p.hidden_states);
  const Panels<T> weights = {static_cast<const T*>(p.packed) + panel * p.pairs * kPair, p.pairs, p.panels - panel};
  const Product product = {shared};
  product.multiply(
      weights, [&](int i) { return first + i < p.T ? x + (first + i) * p.H : nullptr; }, p.H, is_aligned(x, p.H));
  const int lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x / kWarpSize; i < kRows && first + i < p.T; i += kWarps)
    store_partial(p, first + i, panel * kPanel + lane, product.sum(i, lane));
}

// A block: one row. Strips are summed in an order that V decides.
template <int kRowThreads>
__global__ void __launch_bounds__(kRowThreads, 1) lm_head_merge_kernel(LmHeadChooseParams p) {
  const int64_t t = blockIdx.x, strips = (p.V + kStrip - 1) / kStrip;
  float highest = -kInfinity, sum = 0;
  uint64_t best = 0;
  for (int64_t s = threadIdx.x; s < strips; s += kRowThreads) {
    const HeadPartial& partial = p.head_partials[s * p.T + t];
    highest = fmaxf(highest, partial.highest);
    best = best < partial.best ? partial.best : best;
  }
  highest = block_reduce<kRowThreads>(highest, [](float a, float b) { return fmaxf(a, b); });
  best = block_max<kRowThreads>(best);
  for (int64_t s = threadIdx.x; s < strips; s += kRowThreads) {
    const HeadPartial& partial = p.head_partials[s * p.T + t];
    sum += partial.sum * expf(partial.highest - highest);
  }
  sum = block_sum<kRowThreads>(sum);

  const Law law = law_of(p, t);
  int32_t token = exists(law) ? id_of(best) : -1;
  float logit = p.head_partials[id_of(best) / kStrip * p.T + t].logit;
  if (token >= 0 && is_truncated(law, p.V)) {
    const float* logits = p.logits + t * p.V;
    token =
        choose_kept<kRowThreads>(law, noise_key(p, t), logits, p.V, kept_from<kRowThreads>(law, logits, p.V, highest));
    if (token < 0) token = 0;  // no logit is a number
    logit = logits[token];
  }
  if (threadIdx.x == 0) {
    p.tokens[t] = token;
    p.logprobs[t] = token < 0 ? __builtin_nanf("") : logit - (highest + logf(sum));
  }
}

template <class T, int kRows>
void launch(const LmHeadChooseParams& p, void* stream) {
  const int64_t chunks = (p.T + kRows - 1) / kRows, strips = (p.V + kStrip - 1) / kStrip;
  BLOCKDRAFT_LAUNCH((lm_head_choose_kernel<T, kRows>), dim3(static_cast<unsigned>(chunks * strips)), dim3(kThreads), 0,
                    stream, p);
}

template <class T>
void launch_for_rows(const LmHeadChooseParams& p, void* stream) {
  if constexpr (kTileRows == 8)
    if (p.T <= 8) return launch<T, 8>(p, stream);
  p.T <= 16 ? launch<T, 16>(p, stream) : launch<T, 32>(p, stream);
}

}  // namespace

const char* lm_head_choose(const LmHeadChooseParams& p, void* stream) {
  if (p.dtype == DType::kFloat32)
    launch_for_rows<float>(p, stream);
  else
    launch_for_rows<BFloat16>(p, stream);
  visit_row_threads(p.V, [&](auto threads) {
    BLOCKDRAFT_LAUNCH(lm_head_merge_kernel<threads()>, dim3(static_cast<unsigned>(p.T)), dim3(threads()), 0, stream, p);
  });
  return last_error();
}

}  // namespace blockdraft::gpu
