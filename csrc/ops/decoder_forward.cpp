// decoder_forward: the layers of ZAYA1 from token ids to normed hidden states, in one call.
//
//   x, residual = residual_norm(packed_embedding(token_ids))
//   in each layer:
//   qkv                       = packed_linear(x, qkv_proj)
//   q, k, v                   = cca_mix(qkv)                                 keys and values into the layer's pages
//   x, residual               = residual_norm(packed_linear(block_attention(q, k, v), o_proj), residual)
//   id, weight, router_states = moe_router(x, router_states)
//   x, residual               = residual_norm(moe_experts(x, id, weight), residual)
//
// These are the operators themselves, below their checks, so the bits are those of python/blockdraft/model/layers.py.
// Each kind of weight is one tensor for all layers: arguments and checks cost the same for 5 layers and for 40.
#include <tuple>

#include "ops/run.h"

namespace blockdraft {
namespace {

constexpr const char* kName = "decoder_forward";
constexpr ScalarType kFloat = ScalarType::Float, kInt = ScalarType::Int, kByte = ScalarType::Byte;
constexpr int64_t kLeastRoom = 65536;  // bytes: one row of a small model in one allocation

// A tensor whose first axis is the layer.
struct Stacked {
  char* first = nullptr;
  int64_t layer_bytes = 0;

  Stacked() = default;
  Stacked(const void* data, const Tensor& t)
      : first(static_cast<char*>(const_cast<void*>(data))),
        layer_bytes(t.numel() / std::max<int64_t>(1, t.size(0)) * static_cast<int64_t>(t.element_size())) {}
  void* operator[](int64_t layer) const { return first + layer * layer_bytes; }
  const float* floats(int64_t layer) const { return static_cast<const float*>((*this)[layer]); }
};

struct Sizes {
  Dim T{"T"}, L{"L"}, H{"H"}, h_panels{"ceil(H / 32)"}, h_pairs{"ceil(H / 2)"}, v_panels{"ceil(V / 32)"};
  Dim heads{"Hq + Hkv"}, Hkv{"Hkv"}, D{"D"}, d_panels{"ceil(D / 32)"}, C{"C"}, q_pairs{"Hq * D / 2"},
      width_panels{"ceil((C + Hkv * D) / 32)"}, delayed{"Hkv * D / 2"}, S{"S"};
  Dim N{"N"}, tiles{"tiles"}, k_size{"32 * D"}, v_size{"32 * D rounded up to 32"}, B{"B"}, B1{"B + 1"}, M{"M"};
  Dim others{"L - 1"}, R{"R"}, r_panels{"ceil(R / 32)"}, r_pairs{"ceil(R / 2)"};
  Dim classes{"E + 1"}, e_panels{"ceil((E + 1) / 32)"}, E{"E"}, up_panels{"2 * ceil(I / 32)"}, i_pairs{"ceil(I / 2)"};
  Dim two{"2", 2}, pair{"64", kPanelPair};

  int64_t width() const { return C + Hkv * D; }
};

// The list of weights in the order in which they are taken, which is that of python/blockdraft/ops/decoder_forward.py.
class WeightList {
 public:
  WeightList(const Checker& checker, const std::vector<Tensor>& list) : checker_(checker), list_(list) {}

  Stacked take(const char* name, std::initializer_list<Dim*> dims, ScalarType dtype) {
    return take(name, dims, {dtype});
  }
  Stacked take(const char* name, std::initializer_list<Dim*> dims, std::initializer_list<ScalarType> dtypes) {
    check(taken_ < list_.size(), kName, ": weights must have ", name, " at ", taken_, ", got ", list_.size(),
          " tensors");
    const Tensor& t = list_[taken_++];
    checker_.tensor(t, name, dims, dtypes);
    return {t.const_data_ptr(), t};
  }
  // kFloat where there is no next one: take() says so.
  ScalarType next_dtype() const { return taken_ < list_.size() ? list_[taken_].scalar_type() : kFloat; }
  void end() const { check(taken_ == list_.size(), kName, ": weights must be ", taken_, ", got ", list_.size()); }

 private:
  const Checker& checker_;
  const std::vector<Tensor>& list_;
  size_t taken_ = 0;
};

struct InputWeights {
  Stacked hidden_states_scale, hidden_states_bias, norm_weight, embedding;

  InputWeights(WeightList& list, Sizes& s, ScalarType dtype) {
    hidden_states_scale = list.take("input.hidden_states_scale", {&s.H}, kFloat);
    hidden_states_bias = list.take("input.hidden_states_bias", {&s.H}, kFloat);
    norm_weight = list.take("input.weight", {&s.H}, kFloat);
    check(s.H > 0, kName, ": H must be positive, got ", s.H.size);
    s.h_panels.size = ceil_div(s.H, kPanelOutputs), s.h_pairs.size = ceil_div(s.H, 2);
    embedding = list.take("lm_head.weight", {&s.v_panels, &s.h_pairs, &s.pair}, dtype);
  }
};

struct AttentionWeights {
  Stacked conv_qk_grouped, temp, qkv_proj, conv_qk_depthwise, conv_depthwise_bias, conv_grouped_bias, o_proj;

  AttentionWeights(WeightList& list, Sizes& s, ScalarType dtype) {
    conv_qk_grouped = list.take("self_attn.conv_qk_grouped", {&s.L, &s.heads, &s.d_panels, &s.D, &s.pair}, dtype);
    temp = list.take("self_attn.temp", {&s.L, &s.Hkv}, kFloat);
    check(s.Hkv > 0 && s.heads > s.Hkv, kName, ": heads must be more than Hkv=", s.Hkv.size, ", got ", s.heads.size);
    s.C.size = s.heads * s.D, s.q_pairs.size = (s.heads - s.Hkv) * s.D / 2, s.delayed.size = s.Hkv * s.D / 2;
    s.width_panels.size = ceil_div(s.width(), kPanelOutputs);
    s.k_size.size = kPanelOutputs * s.D, s.v_size.size = kPanelOutputs * ceil_div(s.D, kPanelOutputs) * kPanelOutputs;
    checked_panels(s);
    qkv_proj = list.take("self_attn.qkv_proj.weight", {&s.L, &s.width_panels, &s.h_pairs, &s.pair}, dtype);
    conv_qk_depthwise = list.take("self_attn.conv_qk_depthwise", {&s.L, &s.two, &s.C}, kFloat);
    conv_depthwise_bias = list.take("self_attn.conv_depthwise_bias", {&s.L, &s.C}, kFloat);
    conv_grouped_bias = list.take("self_attn.conv_grouped_bias", {&s.L, &s.C}, kFloat);
    o_proj = list.take("self_attn.o_proj.weight", {&s.L, &s.h_panels, &s.q_pairs, &s.pair}, dtype);
  }
  static void checked_panels(const Sizes& s) {
    check(s.d_panels == ceil_div(s.D, kPanelOutputs), kName, ": panels of self_attn.conv_qk_grouped must be ",
          ceil_div(s.D, kPanelOutputs), ", got ", s.d_panels.size);
  }
};

struct MergeWeights {
  Stacked hidden_states_scale, hidden_states_bias, residual_scale, residual_bias, norm_weight;

  MergeWeights(WeightList& list, Sizes& s, const char* const (&names)[5]) {
    Stacked* const own[] = {&hidden_states_scale, &hidden_states_bias, &residual_scale, &residual_bias, &norm_weight};
    for (int i = 0; i < 5; ++i) *own[i] = list.take(names[i], {&s.L, &s.H}, kFloat);
  }
};

constexpr const char* kPostAttention[] = {"post_attention.hidden_states_scale", "post_attention.hidden_states_bias",
                                          "post_attention.residual_scale", "post_attention.residual_bias",
                                          "post_attention.weight"};
constexpr const char* kPostMlp[] = {"post_mlp.hidden_states_scale", "post_mlp.hidden_states_bias",
                                    "post_mlp.residual_scale", "post_mlp.residual_bias", "post_mlp.weight"};

struct MoeWeights {
  Stacked down_proj_bias, balancing_biases, down_proj, router_states_scale, norm_weight, fc1, fc1_bias, fc2, fc2_bias,
      out_proj, gate_up_proj, expert_down_proj, gate_up_scales, expert_down_scales;
  ScalarType expert_dtype;

  MoeWeights(WeightList& list, Sizes& s, ScalarType dtype, int64_t intermediate_size) {
    down_proj_bias = list.take("mlp.down_proj_bias", {&s.L, &s.R}, kFloat);
    balancing_biases = list.take("mlp.balancing_biases", {&s.L, &s.classes}, kFloat);
    check(s.R > 0 && s.classes > 1 && intermediate_size > 0, kName,
          ": R, E and intermediate_size must be positive, got ", s.R.size, ", ", s.classes - 1, " and ",
          intermediate_size);
    s.r_panels.size = ceil_div(s.R, kPanelOutputs), s.r_pairs.size = ceil_div(s.R, 2);
    s.e_panels.size = ceil_div(s.classes, kPanelOutputs), s.E.size = s.classes - 1, s.others.size = s.L - 1;
    s.up_panels.size = 2 * ceil_div(intermediate_size, kPanelOutputs), s.i_pairs.size = ceil_div(intermediate_size, 2);
    down_proj = list.take("mlp.down_proj", {&s.L, &s.r_panels, &s.h_pairs, &s.pair}, dtype);
    router_states_scale = list.take("mlp.router_states_scale", {&s.others, &s.R}, kFloat);  // layer 0 has none
    norm_weight = list.take("mlp.norm_weight", {&s.L, &s.R}, kFloat);
    fc1 = list.take("mlp.fc1", {&s.L, &s.r_panels, &s.r_pairs, &s.pair}, dtype);
    fc1_bias = list.take("mlp.fc1_bias", {&s.L, &s.R}, kFloat);
    fc2 = list.take("mlp.fc2", {&s.L, &s.r_panels, &s.r_pairs, &s.pair}, dtype);
    fc2_bias = list.take("mlp.fc2_bias", {&s.L, &s.R}, kFloat);
    out_proj = list.take("mlp.out_proj", {&s.L, &s.e_panels, &s.r_pairs, &s.pair}, dtype);
    expert_dtype = list.next_dtype();
    check_blocks(kName, expert_dtype, s.H, intermediate_size);
    Dim pair = pair_dim(expert_dtype);
    gate_up_proj = list.take("mlp.gate_up_proj", {&s.L, &s.E, &s.up_panels, &s.h_pairs, &pair},
                             {dtype, ScalarType::Char, ScalarType::Float8_e4m3fn, ScalarType::Byte});
    expert_down_proj = list.take("mlp.expert_down_proj", {&s.L, &s.E, &s.h_panels, &s.i_pairs, &pair}, expert_dtype);
  }
  void take_scales(WeightList& list, Sizes& s, int64_t intermediate_size) {
    Dim up_rows{"2 * I", 2 * intermediate_size}, h_blocks{"H / 32", s.H / kMxBlock},
        i_blocks{"I / 32", intermediate_size / kMxBlock}, outputs{"32", kPanelOutputs};
    if (has_row_scales(expert_dtype)) {
      gate_up_scales = list.take("mlp.gate_up_scales", {&s.L, &s.E, &up_rows}, kFloat);
      expert_down_scales = list.take("mlp.expert_down_scales", {&s.L, &s.E, &s.H}, kFloat);
    } else if (has_block_scales(expert_dtype)) {
      gate_up_scales = list.take("mlp.gate_up_scales", {&s.L, &s.E, &s.up_panels, &h_blocks, &outputs}, kByte);
      expert_down_scales = list.take("mlp.expert_down_scales", {&s.L, &s.E, &s.h_panels, &i_blocks, &outputs}, kByte);
    }
  }
};

// What the layers of one kind share.
struct LayerKind {
  const float* inverse_frequencies;
  int64_t half_rotary, sliding_window;
  float* rotary;
};

// The rows of a step and the cache, all layers of it.
struct Step {
  const Tensor &token_ids, &row_parents, &row_positions, &row_states, &row_slots, &row_prefix, &row_group_begin,
      &row_group_end, &cu_rows, &page_table, &k_pages, &v_pages, &conv_states, &recurrent_states;

  void check_rows(const Checker& checker, Sizes& s) const {
    checker.tensor(token_ids, "token_ids", {&s.T}, {kInt});
    checker.tensor(row_parents, "row_parents", {&s.T}, {kInt});
    checker.tensor(row_positions, "row_positions", {&s.T}, {kInt});
    checker.tensor(row_states, "row_states", {&s.T}, {kInt});
    checker.tensor(row_slots, "row_slots", {&s.T}, {ScalarType::Long});
    checker.tensor(row_prefix, "row_prefix", {&s.T}, {kInt});
    checker.tensor(row_group_begin, "row_group_begin", {&s.T}, {kInt});
    checker.tensor(row_group_end, "row_group_end", {&s.T}, {kInt});
    checker.tensor(page_table, "page_table", {&s.B, &s.M}, {kInt});
    s.B1.size = s.B + 1;
    checker.tensor(cu_rows, "cu_rows", {&s.B1}, {kInt});
  }
  void check_cache(const Checker& checker, Sizes& s) const {
    const std::initializer_list<ScalarType> same = {k_pages.scalar_type()};
    checker.tensor(k_pages, "k_pages", {&s.L, &s.N, &s.Hkv, &s.tiles, &s.k_size}, same);
    checker.tensor(v_pages, "v_pages", {&s.L, &s.N, &s.Hkv, &s.tiles, &s.v_size}, same);
    checker.tensor(conv_states, "conv_states", {&s.L, &s.S, &s.two, &s.C}, same);
    checker.tensor(recurrent_states, "recurrent_states", {&s.L, &s.S, &s.delayed}, same);
  }
  void check_indices(const Sizes& s, int64_t vocab_size) const {
    check_values<int32_t>(kName, "token_ids", token_ids, 0, vocab_size - 1);
    check_values<int32_t>(kName, "row_parents", row_parents, -1, s.T - 1);
    check_values<int32_t>(kName, "row_states", row_states, 0, s.S - 1);
    check_values<int64_t>(kName, "row_slots", row_slots, -1, s.N * s.tiles * kPanelOutputs - 1);
  }
};

// The layers over the rows of one step. Params that are the same in all layers are set once; each layer sets the rest.
struct Layers {
  AttentionWeights attention_weights;
  MergeWeights post_attention;
  MoeWeights moe_weights;
  MergeWeights post_mlp;
  Stacked k_pages, v_pages, conv_states, recurrent_states, projections;
  std::vector<LayerKind> kinds;
  CcaMixParams mix{};
  BlockAttentionParams attention{};
  ResidualNormParams norm{};
  MoeRouterParams router{};
  MoeExpertsParams experts{};
  void* x = nullptr;                                       // [T, H] of dtype, normed
  int32_t* arrivals = nullptr;                             // GPU: [kArrivals]
  float *residual = nullptr, *next_residual = nullptr;     // [T, H]
  float *router_states = nullptr, *next_states = nullptr;  // [T, R]

  Layers(WeightList& list, Sizes& s, ScalarType dtype, int64_t intermediate_size)
      : attention_weights(list, s, dtype),
        post_attention(list, s, kPostAttention),
        moe_weights(list, s, dtype, intermediate_size),
        post_mlp(list, s, kPostMlp) {
    moe_weights.take_scales(list, s, intermediate_size);
    list.end();
    experts.weight_dtype = to_dtype(moe_weights.expert_dtype);
    experts.I = intermediate_size;
  }

  void set_step(const Step& step, const Sizes& s) {
    CcaMixParams& m = mix;
    m.row_parents = read<int32_t>(step.row_parents), m.row_positions = read<int32_t>(step.row_positions);
    m.row_states = read<int32_t>(step.row_states), m.row_slots = read<int64_t>(step.row_slots);
    m.T = s.T, m.Hq = s.heads - s.Hkv, m.Hkv = s.Hkv, m.D = s.D, m.S = s.S, m.N = s.N;
    m.page_size = s.tiles * kPanelOutputs;
    BlockAttentionParams& a = attention;
    a.page_table = read<int32_t>(step.page_table), a.cu_rows = read<int32_t>(step.cu_rows);
    a.row_positions = m.row_positions, a.row_prefix = read<int32_t>(step.row_prefix);
    a.row_group_begin = read<int32_t>(step.row_group_begin), a.row_group_end = read<int32_t>(step.row_group_end);
    a.T = s.T, a.Hq = m.Hq, a.Hkv = s.Hkv, a.D = s.D, a.B = s.B, a.M = s.M, a.N = s.N, a.page_size = m.page_size;
    norm.T = s.T, norm.H = s.H;
    router.T = s.T, router.H = s.H, router.R = s.R, router.E = s.E, router.pairs = s.h_pairs;
    experts.T = s.T, experts.H = s.H, experts.E = s.E, experts.pairs = s.h_pairs, experts.inner_pairs = s.i_pairs;
    k_pages = Stacked(step.k_pages.mutable_data_ptr(), step.k_pages);
    v_pages = Stacked(step.v_pages.mutable_data_ptr(), step.v_pages);
    conv_states = Stacked(step.conv_states.const_data_ptr(), step.conv_states);
    recurrent_states = Stacked(step.recurrent_states.const_data_ptr(), step.recurrent_states);
    mix.dtype = attention.dtype = norm.dtype = router.dtype = experts.dtype = to_dtype(step.k_pages.scalar_type());
  }

  // What the kernels rely on, and the error of the operator that does.
  void check_kinds() {
    for (const LayerKind& kind : kinds) {
      mix.half_rotary = kind.half_rotary, attention.sliding_window = kind.sliding_window;
      check_sizes(mix);
      check_sizes(attention);
    }
  }

  void linear(const void* in, const void* packed, int64_t N, int64_t K, void* out, Workspace& room,
              const ResidualNormParams* then = nullptr) const {
    run(PackedLinearParams{.x = in,
                           .rows = nullptr,
                           .packed = packed,
                           .out = out,
                           .T = norm.T,
                           .N = N,
                           .K = K,
                           .panels = ceil_div(N, kPanelOutputs),
                           .pairs = ceil_div(K, 2),
                           .dtype = norm.dtype,
                           .out_float32 = false},
        room, then, arrivals);
  }

  // Room for what passes from layer to layer, and the start of the stream.
  void start(const InputWeights& w, const void* embedded, void* normed, Workspace& kept) {
    x = normed;
    residual = kept.take<float>(norm.T * norm.H), next_residual = kept.take<float>(norm.T * norm.H);
    router_states = kept.take<float>(norm.T * router.R), next_states = kept.take<float>(norm.T * router.R);
    ResidualNormParams first = norm;
    first.hidden_states = embedded;
    first.hidden_states_scale = w.hidden_states_scale.floats(0),
    first.hidden_states_bias = w.hidden_states_bias.floats(0);
    first.norm_weight = w.norm_weight.floats(0);
    first.normed = x, first.residual_out = residual;
    run(first, kept);
  }

  // Layers of a kind share the cosines and sines.
  float* rotary(const LayerKind& kind, Workspace& kept) {
    mix.inverse_frequencies = kind.inverse_frequencies, mix.half_rotary = kind.half_rotary;
    return rotary_of(mix, kept);
  }

  // Attention of layer i and the norm after it.
  void attend(int64_t i, const LayerKind& kind, const AttentionPlan& plan, Workspace& room) {
    const AttentionWeights& w = attention_weights;
    CcaMixParams& m = mix;
    const int64_t q_size = m.Hq * m.D, kv_size = m.Hkv * m.D;
    void* qkv = projections[i];
    linear(x, w.qkv_proj[i], q_size + 2 * kv_size, norm.H, qkv, room);
    m.qkv = qkv;
    m.conv_states = conv_states[i], m.recurrent_states = recurrent_states[i];
    m.conv_qk_depthwise = w.conv_qk_depthwise.floats(i), m.conv_depthwise_bias = w.conv_depthwise_bias.floats(i);
    m.conv_qk_grouped = w.conv_qk_grouped[i], m.conv_grouped_bias = w.conv_grouped_bias.floats(i);
    m.temp = w.temp.floats(i);
    m.inverse_frequencies = kind.inverse_frequencies, m.half_rotary = kind.half_rotary, m.rotary = kind.rotary;
    m.q = room.take(m.T * q_size, m.dtype), m.k = room.take(m.T * kv_size, m.dtype);
    m.v = room.take(m.T * kv_size, m.dtype);
    m.k_pages = k_pages[i], m.v_pages = v_pages[i];
    run(m, room);

    BlockAttentionParams& a = attention;
    a.q = m.q, a.k = m.k, a.v = m.v, a.k_pages = m.k_pages, a.v_pages = m.v_pages;
    a.sliding_window = kind.sliding_window;
    a.out = room.take(m.T * q_size, m.dtype);
    run(a, plan, room);
    void* out = room.take(norm.T * norm.H, norm.dtype);
    set_norm(i, post_attention, out);
    linear(a.out, w.o_proj[i], norm.H, q_size, out, room, joined());
    if (!joined()) run(norm, room);
    std::swap(residual, next_residual);
  }

  // The experts of layer i and the norm after them.
  void mlp(int64_t i, Workspace& room) {
    const MoeWeights& w = moe_weights;
    MoeRouterParams& r = router;
    r.x = x;
    r.router_states = i ? router_states : nullptr;
    r.router_states_scale = i ? w.router_states_scale.floats(i - 1) : nullptr;
    r.down_proj = w.down_proj[i], r.down_proj_bias = w.down_proj_bias.floats(i);
    r.norm_weight = w.norm_weight.floats(i);
    r.fc1 = w.fc1[i], r.fc1_bias = w.fc1_bias.floats(i);
    r.fc2 = w.fc2[i], r.fc2_bias = w.fc2_bias.floats(i);
    r.out_proj = w.out_proj[i], r.balancing_biases = w.balancing_biases.floats(i);
    r.topk_weights = room.take<float>(r.T), r.topk_ids = room.take<int32_t>(r.T);
    r.router_states_out = next_states;
    run(r, room);
    std::swap(router_states, next_states);

    MoeExpertsParams& e = experts;
    e.x = x, e.topk_ids = r.topk_ids, e.topk_weights = r.topk_weights;
    e.gate_up_proj = w.gate_up_proj[i], e.down_proj = w.expert_down_proj[i];
    e.gate_up_scales = w.gate_up_scales[i], e.down_scales = w.expert_down_scales[i];
    e.out = room.take(e.T * e.H, e.dtype);
    set_norm(i, post_mlp, e.out);
    run(e, room);
    run(norm, room);
    std::swap(residual, next_residual);
  }

  // The norm where the kernel before it goes on with it.
  const ResidualNormParams* joined() const { return arrivals && norm.T <= kMostJoinedRows ? &norm : nullptr; }

  void set_norm(int64_t i, const MergeWeights& w, const void* hidden_states) {
    norm.hidden_states = hidden_states, norm.residual = residual;
    norm.hidden_states_scale = w.hidden_states_scale.floats(i),
    norm.hidden_states_bias = w.hidden_states_bias.floats(i);
    norm.residual_scale = w.residual_scale.floats(i), norm.residual_bias = w.residual_bias.floats(i);
    norm.norm_weight = w.norm_weight.floats(i);
    norm.normed = x, norm.residual_out = next_residual;
  }

  void layer(int64_t i, const LayerKind& kind, const AttentionPlan& plan, Workspace& room) {
    room.reset();
    attend(i, kind, plan, room);
    mlp(i, room);
  }
};

std::vector<LayerKind> make_kinds(const Checker& checker, const std::vector<Tensor>& inverse_frequencies,
                                  const std::vector<int64_t>& sliding_windows,
                                  const std::vector<int64_t>& layer_kinds) {
  const auto count = static_cast<int64_t>(inverse_frequencies.size());
  checker.size("length of sliding_windows", static_cast<int64_t>(sliding_windows.size()), count);
  std::vector<LayerKind> kinds;
  for (int64_t i = 0; i < count; ++i) {
    Dim half{"rotary / 2"};
    checker.tensor(inverse_frequencies[i], "inverse_frequencies", {&half}, {kFloat});
    kinds.push_back({read<float>(inverse_frequencies[i]), half, sliding_windows[i], nullptr});
  }
  for (int64_t kind : layer_kinds)
    check(kind >= 0 && kind < count, kName, ": layer_kinds must be in [0, ", count - 1, "], got ", kind);
  return kinds;
}

void run(Layers& layers, const InputWeights& input, const int32_t* token_ids, int64_t vocab_size,
         const std::vector<int64_t>& layer_kinds, const Tensor& hidden_states) {
  Workspace kept(hidden_states, kLeastRoom), room(hidden_states, kLeastRoom);
  const ResidualNormParams& norm = layers.norm;
  void* embedded = room.take(norm.T * norm.H, norm.dtype);
  if constexpr (kBackend != Backend::kCpu) layers.arrivals = kept.take<int32_t>(kArrivals);
  run(PackedEmbeddingParams{.token_ids = token_ids,
                            .packed = input.embedding.first,
                            .out = embedded,
                            .arrivals = layers.arrivals,
                            .T = norm.T,
                            .V = vocab_size,
                            .H = norm.H,
                            .pairs = layers.router.pairs,
                            .arrival_count = layers.arrivals ? kArrivals : 0,
                            .dtype = norm.dtype},
      room);
  layers.start(input, embedded, hidden_states.mutable_data_ptr(), kept);
  const AttentionPlan plan(layers.attention);
  for (LayerKind& kind : layers.kinds) kind.rotary = layers.rotary(kind, kept);
  for (size_t i = 0; i < layer_kinds.size(); ++i)
    layers.layer(static_cast<int64_t>(i), layers.kinds[layer_kinds[i]], plan, room);
}

std::tuple<Tensor, Tensor> decoder_forward(
    const Tensor& token_ids, const Tensor& row_parents, const Tensor& row_positions, const Tensor& row_states,
    const Tensor& row_slots, const Tensor& row_prefix, const Tensor& row_group_begin, const Tensor& row_group_end,
    const Tensor& cu_rows, const Tensor& page_table, const Tensor& k_pages, const Tensor& v_pages,
    const Tensor& conv_states, const Tensor& recurrent_states, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& inverse_frequencies, const std::vector<int64_t>& sliding_windows,
    const std::vector<int64_t>& layer_kinds, int64_t vocab_size, int64_t intermediate_size, bool skip_identity,
    double softmax_scale, double eps) {
  const Step step{token_ids,     row_parents, row_positions, row_states, row_slots, row_prefix,  row_group_begin,
                  row_group_end, cu_rows,     page_table,    k_pages,    v_pages,   conv_states, recurrent_states};
  Sizes s;
  s.L.size = static_cast<int64_t>(layer_kinds.size());
  check(s.L > 0, kName, ": layer_kinds must have an entry for each layer, got none");
  const Checker checker(kName, token_ids);
  step.check_rows(checker, s);
  WeightList list(checker, weights);
  const ScalarType dtype = k_pages.scalar_type();  // that of the weights, too
  check(dtype == kFloat || dtype == ScalarType::BFloat16, kName, ": k_pages must be Float or BFloat16, got ",
        torch::headeronly::toString(dtype));
  const InputWeights input(list, s, dtype);
  checker.size("panels of lm_head.weight", s.v_panels, ceil_div(vocab_size, kPanelOutputs));
  Layers layers(list, s, dtype, intermediate_size);
  step.check_cache(checker, s);
  layers.kinds = make_kinds(checker, inverse_frequencies, sliding_windows, layer_kinds);
  layers.set_step(step, s);
  layers.check_kinds();
  step.check_indices(s, vocab_size);
  layers.attention.softmax_scale = static_cast<float>(softmax_scale);
  layers.norm.eps = layers.router.eps = static_cast<float>(eps);
  layers.experts.skip_identity = skip_identity;

  Tensor hidden_states = torch::stable::new_empty(k_pages, {s.T, s.H});
  Tensor projections = torch::stable::new_empty(k_pages, {s.L, s.T, s.width()});
  if (s.T == 0) return {hidden_states, projections};
  check_rows(layers.attention);
  layers.projections = Stacked(projections.mutable_data_ptr(), projections);
  run(layers, input, read<int32_t>(token_ids), vocab_size, layer_kinds, hidden_states);
  return {hidden_states, projections};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "decoder_forward(Tensor token_ids, Tensor row_parents, Tensor row_positions, Tensor row_states, "
        "Tensor row_slots, Tensor row_prefix, Tensor row_group_begin, Tensor row_group_end, Tensor cu_rows, "
        "Tensor page_table, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor conv_states, Tensor recurrent_states, "
        "Tensor[] weights, Tensor[] inverse_frequencies, int[] sliding_windows, int[] layer_kinds, int vocab_size, "
        "int intermediate_size, bool skip_identity, float softmax_scale, float eps) "
        "-> (Tensor hidden_states, Tensor projections)");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) {
  m.impl("decoder_forward", TORCH_BOX(&decoder_forward));
}

}  // namespace blockdraft
