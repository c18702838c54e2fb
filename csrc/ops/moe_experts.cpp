#include "ops/moe_experts.h"

#include <vector>

#include "ops/run.h"

namespace blockdraft {
namespace {

// Rows grouped by expert, in their own order within an expert; skipped rows (id E) last.
struct Grouping {
  std::vector<int32_t> sorted_rows, expert_rows, expert_ids;

  Grouping(const int32_t* topk_ids, int64_t T, int64_t E) : sorted_rows(T) {
    std::vector<int32_t> next(E + 2, 0);
    for (int64_t t = 0; t < T; ++t) ++next[topk_ids[t] + 1];
    for (int64_t e = 0; e < E; ++e)
      if (next[e + 1] > 0) expert_ids.push_back(static_cast<int32_t>(e));
    for (int64_t e = 0; e <= E; ++e) next[e + 1] += next[e];
    for (int32_t e : expert_ids) expert_rows.push_back(next[e]);
    expert_rows.push_back(next[E]);
    for (int64_t t = 0; t < T; ++t) sorted_rows[next[topk_ids[t]]++] = static_cast<int32_t>(t);
  }
};

void run_cpu(MoeExpertsParams& p, Workspace& workspace) {
  const Grouping grouping(p.topk_ids, p.T, p.E);
  const int64_t routed = grouping.expert_rows.back();
  p.rows = product_rows(p.x, p.T, p.H, p.dtype, workspace, grouping.sorted_rows.data());
  p.hidden_stride = 2 * p.inner_pairs;
  p.hidden = workspace.take(p.T * p.hidden_stride, row_dtype(p.dtype));
  p.sorted_rows = grouping.sorted_rows.data();
  p.expert_rows = grouping.expert_rows.data();
  p.expert_ids = grouping.expert_ids.data();
  p.touched = static_cast<int64_t>(grouping.expert_ids.size());
  const int64_t mean_rows = std::max<int64_t>(1, routed / std::max<int64_t>(1, p.touched));
  run_tasks(cpu::moe_experts_up, p, p.touched * ceil_div(p.I, kPanelOutputs), 8192 / (p.pairs * mean_rows));
  run_tasks(cpu::moe_experts_down, p, p.touched * ceil_div(p.H, kPanelOutputs), 16384 / (p.inner_pairs * mean_rows));
  p.sorted_rows += routed;
  run_tasks(cpu::moe_experts_skip, p, p.T - routed, 8);
}

void run_gpu(MoeExpertsParams& p, Workspace& workspace) {
  p.hidden_stride = 8 * ceil_div(p.I, 8);  // rows at 16 bytes
  p.hidden = workspace.take(p.T * p.hidden_stride, p.dtype);
  launch_gpu("moe_experts", workspace.like(), [&](void* stream) { return gpu::moe_experts(p, stream); });
}

// `rows`: [E, rows] of float32; `blocks`: [E, panels, blocks, 32], packed bytes.
const void* check_scales(const Checker& checker, const char* name, const std::optional<Tensor>& scales,
                         std::initializer_list<Dim*> rows, std::initializer_list<Dim*> blocks, ScalarType weight) {
  const bool wanted = has_row_scales(weight) || has_block_scales(weight);
  check(scales.has_value() == wanted, "moe_experts: ", name, " must be ", wanted ? "a tensor" : "None",
        " with weights of ", wanted ? torch::headeronly::toString(weight) : "the dtype of x", ", got ",
        wanted ? "None" : "a tensor");
  if (!wanted) return nullptr;
  if (has_block_scales(weight))
    checker.tensor(*scales, name, blocks, {ScalarType::Byte});
  else
    checker.tensor(*scales, name, rows, {ScalarType::Float});
  return scales->const_data_ptr();
}

Tensor moe_experts(const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& gate_up_proj,
                   const Tensor& down_proj, int64_t intermediate_size, bool skip_identity,
                   const std::optional<Tensor>& gate_up_scales, const std::optional<Tensor>& down_scales) {
  Dim T{"T"}, H{"H"}, E{"E"}, up_panels{"2 * ceil(I / 32)"}, down_panels{"ceil(H / 32)"}, h_pairs{"ceil(H / 2)"},
      i_pairs{"ceil(I / 2)"}, up_rows{"2 * I"}, h_blocks{"H / 32"}, i_blocks{"I / 32"}, outputs{"32", kPanelOutputs};
  const Checker checker("moe_experts", x);
  checker.tensor(x, "x", {&T, &H}, {ScalarType::Float, ScalarType::BFloat16});
  check(H > 0, "moe_experts: H must be positive, got ", H.size);
  check(intermediate_size > 0, "moe_experts: intermediate_size must be positive, got ", intermediate_size);
  h_pairs.size = ceil_div(H, 2), i_pairs.size = ceil_div(intermediate_size, 2);
  up_panels.size = 2 * ceil_div(intermediate_size, kPanelOutputs), down_panels.size = ceil_div(H, kPanelOutputs);
  checker.tensor(topk_ids, "topk_ids", {&T}, {ScalarType::Int});
  checker.tensor(topk_weights, "topk_weights", {&T}, {ScalarType::Float});
  const ScalarType weight = gate_up_proj.scalar_type();
  check_blocks("moe_experts", weight, H, intermediate_size);
  Dim pair = pair_dim(weight);
  checker.tensor(gate_up_proj, "gate_up_proj", {&E, &up_panels, &h_pairs, &pair},
                 {x.scalar_type(), ScalarType::Char, ScalarType::Float8_e4m3fn, ScalarType::Byte});
  checker.tensor(down_proj, "down_proj", {&E, &down_panels, &i_pairs, &pair}, {weight});
  up_rows.size = 2 * intermediate_size, h_blocks.size = H / kMxBlock, i_blocks.size = intermediate_size / kMxBlock;
  const void* up_scales = check_scales(checker, "gate_up_scales", gate_up_scales, {&E, &up_rows},
                                       {&E, &up_panels, &h_blocks, &outputs}, weight);
  const void* out_scales =
      check_scales(checker, "down_scales", down_scales, {&E, &H}, {&E, &down_panels, &i_blocks, &outputs}, weight);
  check_values<int32_t>("moe_experts", "topk_ids", topk_ids, 0, E);

  Tensor out = torch::stable::empty_like(x);
  if (T == 0) return out;
  const MoeExpertsParams p{.x = x.const_data_ptr(),
                           .rows = nullptr,
                           .sorted_rows = nullptr,
                           .expert_rows = nullptr,
                           .expert_ids = nullptr,
                           .topk_ids = read<int32_t>(topk_ids),
                           .topk_weights = read<float>(topk_weights),
                           .gate_up_proj = gate_up_proj.const_data_ptr(),
                           .down_proj = down_proj.const_data_ptr(),
                           .gate_up_scales = up_scales,
                           .down_scales = out_scales,
                           .hidden = nullptr,
                           .out = out.mutable_data_ptr(),
                           .T = T,
                           .H = H,
                           .I = intermediate_size,
                           .E = E,
                           .touched = 0,
                           .pairs = h_pairs,
                           .inner_pairs = i_pairs,
                           .hidden_stride = 0,
                           .dtype = to_dtype(x.scalar_type()),
                           .weight_dtype = to_dtype(weight),
                           .skip_identity = skip_identity};
  Workspace workspace(x);
  run(p, workspace);
  return out;
}

}  // namespace

void run(MoeExpertsParams p, Workspace& workspace) {
  if constexpr (kBackend == Backend::kCpu)
    run_cpu(p, workspace);
  else
    run_gpu(p, workspace);
}

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "moe_experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj, "
        "int intermediate_size, bool skip_identity, Tensor? gate_up_scales=None, Tensor? down_scales=None) -> Tensor");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) { m.impl("moe_experts", TORCH_BOX(&moe_experts)); }

}  // namespace blockdraft
