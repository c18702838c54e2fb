#include "ops/verify_tokens.h"

#include <tuple>

#include "common/host.h"

namespace blockdraft {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> verify_tokens(const Tensor& token_ids, const Tensor& chosen,
                                                         const Tensor& cu_rows, const Tensor& verify_lengths,
                                                         const Tensor& limits) {
  Dim T{"T"}, B{"B"}, B1{"B + 1"};
  const Checker checker("verify_tokens", token_ids);
  checker.tensor(token_ids, "token_ids", {&T}, {ScalarType::Int});
  checker.tensor(chosen, "chosen", {&T}, {ScalarType::Int});
  checker.tensor(verify_lengths, "verify_lengths", {&B}, {ScalarType::Int});
  B1.size = B + 1;
  checker.tensor(cu_rows, "cu_rows", {&B1}, {ScalarType::Int});
  checker.tensor(limits, "limits", {&B}, {ScalarType::Int});
  if constexpr (kBackend == Backend::kCpu) {
    const auto *cu = read<int32_t>(cu_rows), *lengths = read<int32_t>(verify_lengths);
    check_values<int32_t>("verify_tokens", "cu_rows", cu_rows, 0, T);
    for (int64_t b = 0; b < B; ++b)
      check(lengths[b] >= 0 && lengths[b] <= cu[b + 1] - cu[b], "verify_tokens: verify_lengths must be in [0, ",
            cu[b + 1] - cu[b], "], got ", lengths[b], " at ", b);
  }

  Tensor accepted = torch::stable::empty_like(limits), committed = torch::stable::empty_like(limits),
         commit_rows = torch::stable::empty_like(limits), next_tokens = torch::stable::empty_like(limits);
  const VerifyTokensParams p{.token_ids = read<int32_t>(token_ids),
                             .chosen = read<int32_t>(chosen),
                             .cu_rows = read<int32_t>(cu_rows),
                             .verify_lengths = read<int32_t>(verify_lengths),
                             .limits = read<int32_t>(limits),
                             .accepted = write<int32_t>(accepted),
                             .committed = write<int32_t>(committed),
                             .commit_rows = write<int32_t>(commit_rows),
                             .next_tokens = write<int32_t>(next_tokens),
                             .T = T,
                             .B = B};
  if constexpr (kBackend == Backend::kCpu) {
    run_tasks(cpu::verify_tokens, p, B, 256);
  } else {
    launch_gpu("verify_tokens", token_ids, [&](void* stream) { return gpu::verify_tokens(p, stream); });
  }
  return {accepted, committed, commit_rows, next_tokens};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "verify_tokens(Tensor token_ids, Tensor chosen, Tensor cu_rows, Tensor verify_lengths, Tensor limits) "
        "-> (Tensor accepted, Tensor committed, Tensor commit_rows, Tensor next_tokens)");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) {
  m.impl("verify_tokens", TORCH_BOX(&verify_tokens));
}

}  // namespace blockdraft
