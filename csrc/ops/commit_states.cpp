#include "ops/commit_states.h"

#include "common/host.h"

namespace blockdraft {
namespace {

void commit_states(const Tensor& qkv, const Tensor& row_parents, const Tensor& commit_rows, const Tensor& state_slots,
                   const Tensor& conv_states, const Tensor& recurrent_states) {
  Dim L{"L"}, T{"T"}, width{"C + Hkv * D"}, B{"B"}, S{"S"}, two{"2", 2}, C{"C"}, delayed{"Hkv * D / 2"};
  const Checker checker("commit_states", qkv);
  checker.tensor(qkv, "qkv", {&L, &T, &width}, {ScalarType::Float, ScalarType::BFloat16});
  const std::initializer_list<ScalarType> same = {qkv.scalar_type()};
  checker.tensor(row_parents, "row_parents", {&T}, {ScalarType::Int});
  checker.tensor(commit_rows, "commit_rows", {&B}, {ScalarType::Int});
  checker.tensor(state_slots, "state_slots", {&B}, {ScalarType::Int});
  checker.tensor(conv_states, "conv_states", {&L, &S, &two, &C}, same);
  checker.tensor(recurrent_states, "recurrent_states", {&L, &S, &delayed}, same);
  checker.size("columns of qkv", width, C + 2 * delayed);
  check_values<int32_t>("commit_states", "row_parents", row_parents, -1, T - 1);
  check_values<int32_t>("commit_states", "commit_rows", commit_rows, -1, T - 1);
  check_values<int32_t>("commit_states", "state_slots", state_slots, 0, S - 1);

  const CommitStatesParams p{.qkv = qkv.const_data_ptr(),
                             .row_parents = read<int32_t>(row_parents),
                             .commit_rows = read<int32_t>(commit_rows),
                             .state_slots = read<int32_t>(state_slots),
                             .conv_states = conv_states.mutable_data_ptr(),
                             .recurrent_states = recurrent_states.mutable_data_ptr(),
                             .L = L,
                             .T = T,
                             .B = B,
                             .S = S,
                             .C = C,
                             .width = width,
                             .delayed = delayed,
                             .dtype = to_dtype(qkv.scalar_type())};
  if constexpr (kBackend == Backend::kCpu) {
    run_tasks(cpu::commit_states, p, L * B, 64);
  } else {
    launch_gpu("commit_states", qkv, [&](void* stream) { return gpu::commit_states(p, stream); });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "commit_states(Tensor qkv, Tensor row_parents, Tensor commit_rows, Tensor state_slots, "
        "Tensor(a!) conv_states, Tensor(b!) recurrent_states) -> ()");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) {
  m.impl("commit_states", TORCH_BOX(&commit_states));
}

}  // namespace blockdraft
