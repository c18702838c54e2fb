#include "ops/cca_mix.h"

#include <tuple>

#include "ops/run.h"

namespace blockdraft {
namespace {

std::tuple<Tensor, Tensor, Tensor> cca_mix(const Tensor& qkv, const Tensor& row_parents, const Tensor& row_positions,
                                           const Tensor& row_states, const Tensor& row_slots, const Tensor& conv_states,
                                           const Tensor& recurrent_states, const Tensor& conv_qk_depthwise,
                                           const Tensor& conv_depthwise_bias, const Tensor& conv_qk_grouped,
                                           const Tensor& conv_grouped_bias, const Tensor& temp,
                                           const Tensor& inverse_frequencies, const Tensor& k_pages,
                                           const Tensor& v_pages) {
  Dim T{"T"}, width{"C + Hkv * D"}, S{"S"}, two{"2", 2}, C{"C"}, delayed{"Hkv * D / 2"}, heads{"Hq + Hkv"},
      panels{"panels"}, D{"D"}, pair{"64", kPanelPair}, Hkv{"Hkv"}, half{"rotary / 2"}, N{"N"}, tiles{"tiles"},
      k_size{"32 * D"}, v_size{"32 * D rounded up to 32"};
  const auto floats = {ScalarType::Float, ScalarType::BFloat16};
  const Checker checker("cca_mix", qkv);
  checker.tensor(qkv, "qkv", {&T, &width}, floats);
  const std::initializer_list<ScalarType> same = {qkv.scalar_type()};
  checker.tensor(row_parents, "row_parents", {&T}, {ScalarType::Int});
  checker.tensor(row_positions, "row_positions", {&T}, {ScalarType::Int});
  checker.tensor(row_states, "row_states", {&T}, {ScalarType::Int});
  checker.tensor(row_slots, "row_slots", {&T}, {ScalarType::Long});
  checker.tensor(conv_states, "conv_states", {&S, &two, &C}, same);
  checker.tensor(recurrent_states, "recurrent_states", {&S, &delayed}, same);
  checker.tensor(conv_qk_depthwise, "conv_qk_depthwise", {&two, &C}, {ScalarType::Float});
  checker.tensor(conv_depthwise_bias, "conv_depthwise_bias", {&C}, {ScalarType::Float});
  checker.tensor(conv_qk_grouped, "conv_qk_grouped", {&heads, &panels, &D, &pair}, same);
  checker.tensor(conv_grouped_bias, "conv_grouped_bias", {&C}, {ScalarType::Float});
  checker.tensor(temp, "temp", {&Hkv}, {ScalarType::Float});
  checker.tensor(inverse_frequencies, "inverse_frequencies", {&half}, {ScalarType::Float});
  checker.tensor(k_pages, "k_pages", {&N, &Hkv, &tiles, &k_size}, same);
  checker.tensor(v_pages, "v_pages", {&N, &Hkv, &tiles, &v_size}, same);
  const int64_t Hq = heads - Hkv, page_size = tiles * kPanelOutputs;
  CcaMixParams p{.qkv = qkv.const_data_ptr(),
                 .row_parents = read<int32_t>(row_parents),
                 .row_positions = read<int32_t>(row_positions),
                 .row_states = read<int32_t>(row_states),
                 .row_slots = read<int64_t>(row_slots),
                 .conv_states = conv_states.const_data_ptr(),
                 .recurrent_states = recurrent_states.const_data_ptr(),
                 .conv_qk_depthwise = read<float>(conv_qk_depthwise),
                 .conv_depthwise_bias = read<float>(conv_depthwise_bias),
                 .conv_qk_grouped = conv_qk_grouped.const_data_ptr(),
                 .conv_grouped_bias = read<float>(conv_grouped_bias),
                 .temp = read<float>(temp),
                 .inverse_frequencies = read<float>(inverse_frequencies),
                 .rotary = nullptr,
                 .mixed = nullptr,
                 .q = nullptr,
                 .k = nullptr,
                 .v = nullptr,
                 .k_pages = k_pages.mutable_data_ptr(),
                 .v_pages = v_pages.mutable_data_ptr(),
                 .T = T,
                 .Hq = Hq,
                 .Hkv = Hkv,
                 .D = D,
                 .S = S,
                 .N = N,
                 .half_rotary = half,
                 .page_size = page_size,
                 .dtype = to_dtype(qkv.scalar_type())};
  check_sizes(p);
  checker.size("C of conv_states", C, heads * D);
  checker.size("columns of qkv", width, C + Hkv * D);
  checker.size("columns of recurrent_states", delayed, Hkv * D / 2);
  checker.size("panels of conv_qk_grouped", panels, ceil_div(D, kPanelOutputs));
  checker.size("last size of k_pages", k_size, kPanelOutputs * D);
  checker.size("last size of v_pages", v_size, kPanelOutputs * panels * kPanelOutputs);
  check_values<int32_t>("cca_mix", "row_parents", row_parents, -1, T - 1);
  check_values<int32_t>("cca_mix", "row_states", row_states, 0, S - 1);
  check_values<int64_t>("cca_mix", "row_slots", row_slots, -1, N * page_size - 1);

  Tensor q = torch::stable::new_empty(qkv, {T, Hq, D}), k = torch::stable::new_empty(qkv, {T, Hkv, D}),
         v = torch::stable::new_empty(qkv, {T, Hkv, D});
  if (T == 0) return {q, k, v};
  p.q = q.mutable_data_ptr(), p.k = k.mutable_data_ptr(), p.v = v.mutable_data_ptr();
  Workspace workspace(qkv);
  run(p, workspace);
  return {q, k, v};
}

}  // namespace

void check_sizes(const CcaMixParams& p) {
  check(p.Hkv > 0 && p.Hq > 0 && p.Hq % p.Hkv == 0, "cca_mix: query heads must be a multiple of Hkv=", p.Hkv, ", got ",
        p.Hq);
  check(p.D > 0 && p.D % 2 == 0 && p.D <= 256, "cca_mix: D must be even and from 2 to 256, got ", p.D);
  check(p.page_size > 0, "cca_mix: k_pages must have at least one tile a page, got 0");
  check(2 * p.half_rotary <= p.D, "cca_mix: inverse_frequencies must have at most D / 2 entries, got ", p.half_rotary);
}

float* rotary_of(const CcaMixParams& p, Workspace& workspace) {
  CcaMixParams own = p;
  if constexpr (kBackend == Backend::kCpu) {
    own.rotary = workspace.take<float>(p.T * 2 * p.half_rotary);
    run_tasks(cpu::cca_mix_rotary, own, p.T, 64);
  }
  return own.rotary;
}

void run(CcaMixParams p, Workspace& workspace) {
  if constexpr (kBackend == Backend::kCpu) {
    const int64_t heads = p.Hq + p.Hkv;
    if (!p.rotary) p.rotary = rotary_of(p, workspace);
    p.mixed = workspace.take<float>(heads * p.T * 2 * p.D);
    run_tasks(cpu::cca_mix, p, heads * ceil_div(p.T, 16), 65536 / (p.D * p.D));
    run_tasks(cpu::cca_mix_store, p, p.T, 16);
  } else {
    launch_gpu("cca_mix", workspace.like(), [&](void* stream) { return gpu::cca_mix(p, stream); });
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "cca_mix(Tensor qkv, Tensor row_parents, Tensor row_positions, Tensor row_states, Tensor row_slots, "
        "Tensor conv_states, Tensor recurrent_states, Tensor conv_qk_depthwise, Tensor conv_depthwise_bias, "
        "Tensor conv_qk_grouped, Tensor conv_grouped_bias, Tensor temp, Tensor inverse_frequencies, "
        "Tensor(a!) k_pages, Tensor(b!) v_pages) -> (Tensor q, Tensor k, Tensor v)");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) { m.impl("cca_mix", TORCH_BOX(&cca_mix)); }

}  // namespace blockdraft
