#include "ops/choose_tokens.h"

#include <tuple>

#include "common/laws.h"

namespace blockdraft {
namespace {

void run_cpu(ChooseTokensParams& p, const Tensor& logits) {
  check_laws("choose_tokens", p);
  const ScratchRows with_top_p(p.T, [&](int64_t t) { return p.temperature[t] > 0 && p.top_p[t] < 1; });
  const Tensor weights = scratch(logits, {with_top_p.count, p.width});
  p.weights_rows = with_top_p.rows.data();
  p.weights = write<float>(weights);
  run_tasks(cpu::choose_tokens, p, p.T, 4096 / p.V);
}

std::tuple<Tensor, Tensor> choose_tokens(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                         const Tensor& top_p, const Tensor& min_p, const Tensor& seeds,
                                         const Tensor& samples, const Tensor& positions) {
  Dim T{"T"}, V{"V"};
  const Checker checker("choose_tokens", logits);
  checker.tensor(logits, "logits", {&T, &V}, {ScalarType::Float});
  checker.tensor(temperature, "temperature", {&T}, {ScalarType::Float});
  checker.tensor(top_k, "top_k", {&T}, {ScalarType::Int});
  checker.tensor(top_p, "top_p", {&T}, {ScalarType::Float});
  checker.tensor(min_p, "min_p", {&T}, {ScalarType::Float});
  checker.tensor(seeds, "seeds", {&T}, {ScalarType::Long});
  checker.tensor(samples, "samples", {&T}, {ScalarType::Int});
  checker.tensor(positions, "positions", {&T}, {ScalarType::Int});
  check(V > 0 && V <= INT32_MAX, "choose_tokens: V must be in [1, ", INT32_MAX, "], got ", V.size);

  Tensor tokens = scratch(logits, {T}, ScalarType::Int), logprobs = scratch(logits, {T});
  if (T == 0) return {tokens, logprobs};
  ChooseTokensParams p{.logits = read<float>(logits),
                       .temperature = read<float>(temperature),
                       .top_k = read<int32_t>(top_k),
                       .top_p = read<float>(top_p),
                       .min_p = read<float>(min_p),
                       .seeds = read<int64_t>(seeds),
                       .samples = read<int32_t>(samples),
                       .positions = read<int32_t>(positions),
                       .weights_rows = nullptr,
                       .weights = nullptr,
                       .tokens = write<int32_t>(tokens),
                       .logprobs = write<float>(logprobs),
                       .T = T,
                       .V = V,
                       .width = kLanes * ceil_div(V, kLanes)};
  if constexpr (kBackend == Backend::kCpu) {
    run_cpu(p, logits);
  } else {
    launch_gpu("choose_tokens", logits, [&](void* stream) { return gpu::choose_tokens(p, stream); });
  }
  return {tokens, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "choose_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
        "Tensor samples, Tensor positions) -> (Tensor tokens, Tensor logprobs)");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) {
  m.impl("choose_tokens", TORCH_BOX(&choose_tokens));
}

}  // namespace blockdraft
