#include "ops/reject_drafts.h"

#include <tuple>

#include "common/laws.h"

namespace blockdraft {
namespace {

void check_uniform(const char* name, float uniform, int64_t t) {
  check(uniform >= 0 && uniform < 1, "reject_drafts: ", name, " must be in [0, 1), got ", uniform, " at ", t);
}

void run_cpu(RejectDraftsParams& p, const Tensor& logits) {
  check_laws("reject_drafts", p);
  for (int64_t t = 0; t < p.T; ++t) {
    check(p.lenience[t] >= 1 && std::isfinite(p.lenience[t]),
          "reject_drafts: lenience must be finite and at least 1, got ", p.lenience[t], " at ", t);
    check_uniform("accept_uniforms", p.accept_uniforms[t], t);
    check_uniform("residual_uniforms", p.residual_uniforms[t], t);
  }
  const ScratchRows with_top_p(p.T, [&](int64_t t) { return p.temperature[t] > 0 && p.top_p[t] < 1; });
  const Tensor weights = scratch(logits, {with_top_p.count, p.width});
  const Tensor sums = scratch(logits, {p.T, p.blocks}, ScalarType::Double);
  p.weights_rows = with_top_p.rows.data();
  p.weights = write<float>(weights);
  p.sums = write<double>(sums);
  run_tasks(cpu::reject_drafts, p, p.T, 4096 / p.V);
}

std::tuple<Tensor, Tensor> reject_drafts(const Tensor& logits, const Tensor& draft_logits, const Tensor& draft_rows,
                                         const Tensor& drafts, const Tensor& temperature, const Tensor& top_k,
                                         const Tensor& top_p, const Tensor& min_p, const Tensor& lenience,
                                         const Tensor& accept_uniforms, const Tensor& residual_uniforms) {
  Dim T{"T"}, V{"V"}, M{"M"};
  const Checker checker("reject_drafts", logits);
  checker.tensor(logits, "logits", {&T, &V}, {ScalarType::Float});
  checker.tensor(draft_logits, "draft_logits", {&M, &V}, {ScalarType::Float});
  checker.tensor(draft_rows, "draft_rows", {&T}, {ScalarType::Int});
  checker.tensor(drafts, "drafts", {&T}, {ScalarType::Int});
  checker.tensor(temperature, "temperature", {&T}, {ScalarType::Float});
  checker.tensor(top_k, "top_k", {&T}, {ScalarType::Int});
  checker.tensor(top_p, "top_p", {&T}, {ScalarType::Float});
  checker.tensor(min_p, "min_p", {&T}, {ScalarType::Float});
  checker.tensor(lenience, "lenience", {&T}, {ScalarType::Float});
  checker.tensor(accept_uniforms, "accept_uniforms", {&T}, {ScalarType::Float});
  checker.tensor(residual_uniforms, "residual_uniforms", {&T}, {ScalarType::Float});
  check(V > 0 && V <= INT32_MAX, "reject_drafts: V must be in [1, ", INT32_MAX, "], got ", V.size);
  check_values<int32_t>("reject_drafts", "draft_rows", draft_rows, -1, M - 1);
  check_values<int32_t>("reject_drafts", "drafts", drafts, 0, V - 1);

  Tensor tokens = scratch(logits, {T}, ScalarType::Int), logprobs = scratch(logits, {T});
  if (T == 0) return {tokens, logprobs};
  RejectDraftsParams p{.logits = read<float>(logits),
                       .draft_logits = read<float>(draft_logits),
                       .draft_rows = read<int32_t>(draft_rows),
                       .drafts = read<int32_t>(drafts),
                       .temperature = read<float>(temperature),
                       .top_k = read<int32_t>(top_k),
                       .top_p = read<float>(top_p),
                       .min_p = read<float>(min_p),
                       .lenience = read<float>(lenience),
                       .accept_uniforms = read<float>(accept_uniforms),
                       .residual_uniforms = read<float>(residual_uniforms),
                       .weights_rows = nullptr,
                       .weights = nullptr,
                       .sums = nullptr,
                       .tokens = write<int32_t>(tokens),
                       .logprobs = write<float>(logprobs),
                       .T = T,
                       .M = M,
                       .V = V,
                       .width = kLanes * ceil_div(V, kLanes),
                       .blocks = ceil_div(V, kSumIds)};
  if constexpr (kBackend == Backend::kCpu) {
    run_cpu(p, logits);
  } else {
    launch_gpu("reject_drafts", logits, [&](void* stream) { return gpu::reject_drafts(p, stream); });
  }
  return {tokens, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "reject_drafts(Tensor logits, Tensor draft_logits, Tensor draft_rows, Tensor drafts, Tensor temperature, "
        "Tensor top_k, Tensor top_p, Tensor min_p, Tensor lenience, Tensor accept_uniforms, "
        "Tensor residual_uniforms) -> (Tensor tokens, Tensor logprobs)");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) {
  m.impl("reject_drafts", TORCH_BOX(&reject_drafts));
}

}  // namespace blockdraft
