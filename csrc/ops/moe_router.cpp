#include "ops/moe_router.h"

#include <tuple>

#include "ops/run.h"

namespace blockdraft {
namespace {

std::tuple<Tensor, Tensor, Tensor> moe_router(const Tensor& x, const std::optional<Tensor>& router_states,
                                              const std::optional<Tensor>& router_states_scale, const Tensor& down_proj,
                                              const Tensor& down_proj_bias, const Tensor& norm_weight,
                                              const Tensor& fc1, const Tensor& fc1_bias, const Tensor& fc2,
                                              const Tensor& fc2_bias, const Tensor& out_proj,
                                              const Tensor& balancing_biases, double eps) {
  Dim T{"T"}, H{"H"}, R{"R"}, classes{"E + 1"}, r_panels{"ceil(R / 32)"}, e_panels{"ceil((E + 1) / 32)"},
      h_pairs{"ceil(H / 2)"}, r_pairs{"ceil(R / 2)"}, pair{"64", kPanelPair};
  const Checker checker("moe_router", x);
  checker.tensor(x, "x", {&T, &H}, {ScalarType::Float, ScalarType::BFloat16});
  const std::initializer_list<ScalarType> same = {x.scalar_type()};
  checker.tensor(down_proj_bias, "down_proj_bias", {&R}, {ScalarType::Float});
  checker.tensor(balancing_biases, "balancing_biases", {&classes}, {ScalarType::Float});
  check(H > 0, "moe_router: H must be positive, got ", H.size);
  check(R > 0 && classes > 1, "moe_router: R and E must be positive, got ", R.size, " and ", classes - 1);
  h_pairs.size = ceil_div(H, 2), r_pairs.size = ceil_div(R, 2);
  r_panels.size = ceil_div(R, kPanelOutputs), e_panels.size = ceil_div(classes, kPanelOutputs);
  checker.tensor(down_proj, "down_proj", {&r_panels, &h_pairs, &pair}, same);
  checker.tensor(norm_weight, "norm_weight", {&R}, {ScalarType::Float});
  checker.tensor(fc1, "fc1", {&r_panels, &r_pairs, &pair}, same);
  checker.tensor(fc1_bias, "fc1_bias", {&R}, {ScalarType::Float});
  checker.tensor(fc2, "fc2", {&r_panels, &r_pairs, &pair}, same);
  checker.tensor(fc2_bias, "fc2_bias", {&R}, {ScalarType::Float});
  checker.tensor(out_proj, "out_proj", {&e_panels, &r_pairs, &pair}, same);
  check(router_states.has_value() == router_states_scale.has_value(),
        "moe_router: router_states and router_states_scale must be given together or not at all");
  if (router_states) {
    checker.tensor(*router_states, "router_states", {&T, &R}, {ScalarType::Float});
    checker.tensor(*router_states_scale, "router_states_scale", {&R}, {ScalarType::Float});
  }

  Tensor topk_ids = scratch(x, {T}, ScalarType::Int), topk_weights = scratch(x, {T});
  Tensor router_states_out = scratch(x, {T, R});
  if (T == 0) return {topk_ids, topk_weights, router_states_out};
  const MoeRouterParams p{.x = x.const_data_ptr(),
                          .rows = nullptr,
                          .router_states = router_states ? read<float>(*router_states) : nullptr,
                          .router_states_scale = router_states ? read<float>(*router_states_scale) : nullptr,
                          .down_proj = down_proj.const_data_ptr(),
                          .down_proj_bias = read<float>(down_proj_bias),
                          .norm_weight = read<float>(norm_weight),
                          .fc1 = fc1.const_data_ptr(),
                          .fc1_bias = read<float>(fc1_bias),
                          .fc2 = fc2.const_data_ptr(),
                          .fc2_bias = read<float>(fc2_bias),
                          .out_proj = out_proj.const_data_ptr(),
                          .balancing_biases = read<float>(balancing_biases),
                          .hidden = nullptr,
                          .topk_weights = write<float>(topk_weights),
                          .topk_ids = write<int32_t>(topk_ids),
                          .router_states_out = write<float>(router_states_out),
                          .T = T,
                          .H = H,
                          .R = R,
                          .E = classes - 1,
                          .pairs = h_pairs,
                          .hidden_stride = 0,
                          .eps = static_cast<float>(eps),
                          .dtype = to_dtype(x.scalar_type())};
  Workspace workspace(x);
  run(p, workspace);
  return {topk_ids, topk_weights, router_states_out};
}

}  // namespace

void run(MoeRouterParams p, Workspace& workspace) {
  p.hidden_stride = kPanelOutputs * ceil_div(std::max(p.R, p.E + 1), kPanelOutputs);
  if constexpr (kBackend == Backend::kCpu) {
    p.rows = product_rows(p.x, p.T, p.H, p.dtype, workspace);
    p.hidden = workspace.take<float>(2 * p.T * p.hidden_stride);
    run_tasks(cpu::moe_router_down, p, ceil_div(p.R, kPanelOutputs), 16384 / (p.pairs * p.T));
    run_tasks(cpu::moe_router, p, p.T, 32768 / (p.R * p.R));
  } else {
    if (const int64_t size = gpu::moe_router_hidden(p)) p.hidden = workspace.take<float>(size);
    launch_gpu("moe_router", workspace.like(), [&](void* stream) { return gpu::moe_router(p, stream); });
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "moe_router(Tensor x, Tensor? router_states, Tensor? router_states_scale, Tensor down_proj, "
        "Tensor down_proj_bias, Tensor norm_weight, Tensor fc1, Tensor fc1_bias, Tensor fc2, Tensor fc2_bias, "
        "Tensor out_proj, Tensor balancing_biases, float eps) "
        "-> (Tensor topk_ids, Tensor topk_weights, Tensor router_states_out)");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) { m.impl("moe_router", TORCH_BOX(&moe_router)); }

}  // namespace blockdraft
