#include "ops/lm_head_choose.h"

#include <tuple>

#include "common/laws.h"

namespace blockdraft {
namespace {

bool is_truncated(const LmHeadChooseParams& p, int64_t t) {
  return p.temperature[t] > 0 && ((p.top_k[t] > 0 && p.top_k[t] < p.V) || p.top_p[t] < 1 || p.min_p[t] > 0);
}

void run_cpu(LmHeadChooseParams& p, const Tensor& hidden_states) {
  check_laws("lm_head_choose", p);
  const ScratchRows truncated(p.T, [&](int64_t t) { return is_truncated(p, t); });
  Workspace workspace(hidden_states);
  const int64_t logits = truncated.count * p.panels * kPanelOutputs;
  p.rows = product_rows(p.hidden_states, p.T, p.H, p.dtype, workspace);
  p.logits_rows = truncated.rows.data();
  p.partial = workspace.take<float>(p.blocks * p.T * 5);
  p.logits = workspace.take<float>(2 * logits);
  p.weights = p.logits + logits;
  run_tasks(cpu::lm_head_choose, p, p.blocks);
  run_tasks(cpu::lm_head_choose_merge, p, p.T);
}

std::tuple<Tensor, Tensor> lm_head_choose(const Tensor& hidden_states, const Tensor& packed_weight, int64_t vocab_size,
                                          const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                                          const Tensor& min_p, const Tensor& seeds, const Tensor& samples,
                                          const Tensor& positions) {
  Dim T{"T"}, H{"H"}, panels{"panels"}, pairs{"pairs"}, pair{"64", kPanelPair};
  const Checker checker("lm_head_choose", hidden_states);
  checker.tensor(hidden_states, "hidden_states", {&T, &H}, {ScalarType::Float, ScalarType::BFloat16});
  checker.tensor(packed_weight, "packed_weight", {&panels, &pairs, &pair}, {hidden_states.scalar_type()});
  checker.size("panels of packed_weight", panels, ceil_div(vocab_size, kPanelOutputs));
  checker.size("pairs of packed_weight", pairs, ceil_div(H, 2));
  checker.tensor(temperature, "temperature", {&T}, {ScalarType::Float});
  checker.tensor(top_k, "top_k", {&T}, {ScalarType::Int});
  checker.tensor(top_p, "top_p", {&T}, {ScalarType::Float});
  checker.tensor(min_p, "min_p", {&T}, {ScalarType::Float});
  checker.tensor(seeds, "seeds", {&T}, {ScalarType::Long});
  checker.tensor(samples, "samples", {&T}, {ScalarType::Int});
  checker.tensor(positions, "positions", {&T}, {ScalarType::Int});
  check(H > 0, "lm_head_choose: H must be positive, got ", H.size);
  check(vocab_size > 0, "lm_head_choose: vocab_size must be positive, got ", vocab_size);

  Tensor tokens = scratch(hidden_states, {T}, ScalarType::Int), logprobs = scratch(hidden_states, {T});
  if (T == 0) return {tokens, logprobs};
  LmHeadChooseParams p{.hidden_states = hidden_states.const_data_ptr(),
                       .rows = nullptr,
                       .packed = packed_weight.const_data_ptr(),
                       .temperature = read<float>(temperature),
                       .top_k = read<int32_t>(top_k),
                       .top_p = read<float>(top_p),
                       .min_p = read<float>(min_p),
                       .seeds = read<int64_t>(seeds),
                       .samples = read<int32_t>(samples),
                       .positions = read<int32_t>(positions),
                       .logits_rows = nullptr,
                       .partial = nullptr,
                       .head_partials = nullptr,
                       .logits = nullptr,
                       .weights = nullptr,
                       .tokens = write<int32_t>(tokens),
                       .logprobs = write<float>(logprobs),
                       .T = T,
                       .H = H,
                       .V = vocab_size,
                       .panels = panels,
                       .pairs = pairs,
                       .blocks = ceil_div(panels, kHeadPanels),
                       .dtype = to_dtype(hidden_states.scalar_type())};
  if constexpr (kBackend == Backend::kCpu) {
    run_cpu(p, hidden_states);
  } else {
    // Which rows are truncated is known on the device alone: there is room for the logits of all.
    const Tensor partials = scratch(hidden_states, {ceil_div(vocab_size, kPanelOutputs), T, 3}, ScalarType::Long);
    const Tensor logits = scratch(hidden_states, {T, vocab_size});
    static_assert(sizeof(HeadPartial) == 3 * sizeof(int64_t));
    p.head_partials = write<HeadPartial>(partials);
    p.logits = write<float>(logits);
    launch_gpu("lm_head_choose", hidden_states, [&](void* stream) { return gpu::lm_head_choose(p, stream); });
  }
  return {tokens, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "lm_head_choose(Tensor hidden_states, Tensor packed_weight, int vocab_size, Tensor temperature, Tensor top_k, "
        "Tensor top_p, Tensor min_p, Tensor seeds, Tensor samples, Tensor positions) "
        "-> (Tensor tokens, Tensor logprobs)");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) {
  m.impl("lm_head_choose", TORCH_BOX(&lm_head_choose));
}

}  // namespace blockdraft
