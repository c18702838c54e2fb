#include "ops/block_attention.h"

#include "ops/run.h"

namespace blockdraft {
namespace {

int32_t seen_keys(const BlockAttentionParams& p, int64_t r) {
  return p.row_prefix[r] + p.row_group_end[r] - p.row_group_begin[r];
}

bool share_a_task(const BlockAttentionParams& p, int32_t first, int32_t r) {
  return p.row_group_begin[r] == p.row_group_begin[first] && p.row_group_end[r] == p.row_group_end[first] &&
         (p.row_group_begin[first] == p.row_group_end[first] || p.row_prefix[r] == p.row_prefix[first]);
}

void check_sequence(const BlockAttentionParams& p, int64_t b) {
  const int32_t first = p.cu_rows[b], last = p.cu_rows[b + 1];
  int64_t longest = 0;
  for (int64_t r = first; r < last; ++r) {
    check(p.row_prefix[r] >= 0 && p.row_prefix[r] <= p.M * p.page_size, "block_attention: row_prefix must be in [0, ",
          p.M * p.page_size, "], got ", p.row_prefix[r], " at ", r);
    check(first <= p.row_group_begin[r] && p.row_group_begin[r] <= p.row_group_end[r] && p.row_group_end[r] <= last,
          "block_attention: the group of row ", r, " must lie in the rows of its sequence, got [", p.row_group_begin[r],
          ", ", p.row_group_end[r], ")");
    check(seen_keys(p, r) > 0, "block_attention: row ", r, " must see at least one key, got 0");
    longest = std::max<int64_t>(longest, p.row_prefix[r]);
  }
  const int32_t* pages = p.page_table + b * p.M;
  for (int64_t i = 0; i < ceil_div(longest, p.page_size); ++i)
    check(pages[i] >= 0 && pages[i] < p.N, "block_attention: page_table must be in [0, ", p.N - 1, "], got ", pages[i],
          " at [", b, ", ", i, "]");
}

Tensor block_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages,
                       const Tensor& page_table, const Tensor& cu_rows, const Tensor& row_positions,
                       const Tensor& row_prefix, const Tensor& row_group_begin, const Tensor& row_group_end,
                       double softmax_scale, int64_t sliding_window) {
  Dim T{"T"}, Hq{"Hq"}, Hkv{"Hkv"}, D{"D"}, N{"N"}, tiles{"tiles"}, k_size{"32 * D"}, v_size{"32 * D rounded up to 32"},
      B{"B"}, M{"M"}, B1{"B + 1"};
  const Checker checker("block_attention", q);
  checker.tensor(q, "q", {&T, &Hq, &D}, {ScalarType::Float, ScalarType::BFloat16});
  const std::initializer_list<ScalarType> same = {q.scalar_type()};
  checker.tensor(k, "k", {&T, &Hkv, &D}, same);
  checker.tensor(v, "v", {&T, &Hkv, &D}, same);
  checker.tensor(k_pages, "k_pages", {&N, &Hkv, &tiles, &k_size}, same);
  checker.tensor(v_pages, "v_pages", {&N, &Hkv, &tiles, &v_size}, same);
  checker.tensor(page_table, "page_table", {&B, &M}, {ScalarType::Int});
  B1.size = B + 1;
  checker.tensor(cu_rows, "cu_rows", {&B1}, {ScalarType::Int});
  checker.tensor(row_positions, "row_positions", {&T}, {ScalarType::Int});
  checker.tensor(row_prefix, "row_prefix", {&T}, {ScalarType::Int});
  checker.tensor(row_group_begin, "row_group_begin", {&T}, {ScalarType::Int});
  checker.tensor(row_group_end, "row_group_end", {&T}, {ScalarType::Int});
  BlockAttentionParams p{.q = q.const_data_ptr(),
                         .k = k.const_data_ptr(),
                         .v = v.const_data_ptr(),
                         .k_pages = k_pages.const_data_ptr(),
                         .v_pages = v_pages.const_data_ptr(),
                         .page_table = read<int32_t>(page_table),
                         .cu_rows = read<int32_t>(cu_rows),
                         .row_positions = read<int32_t>(row_positions),
                         .row_prefix = read<int32_t>(row_prefix),
                         .row_group_begin = read<int32_t>(row_group_begin),
                         .row_group_end = read<int32_t>(row_group_end),
                         .tasks = nullptr,
                         .row_chunks = nullptr,
                         .partial = nullptr,
                         .out = nullptr,
                         .T = T,
                         .Hq = Hq,
                         .Hkv = Hkv,
                         .D = D,
                         .B = B,
                         .M = M,
                         .N = N,
                         .page_size = tiles * kAttentionTile,
                         .sliding_window = sliding_window,
                         .softmax_scale = static_cast<float>(softmax_scale),
                         .dtype = to_dtype(q.scalar_type())};
  check_sizes(p);
  checker.size("last size of k_pages", k_size, kAttentionTile * D);
  checker.size("last size of v_pages", v_size, kAttentionTile * ceil_div(D, kPanelOutputs) * kPanelOutputs);

  Tensor out = torch::stable::empty_like(q);
  if (T == 0) return out;
  check_rows(p);
  p.out = out.mutable_data_ptr();
  Workspace workspace(q);
  run(p, AttentionPlan(p), workspace);
  return out;
}

}  // namespace

void check_sizes(const BlockAttentionParams& p) {
  check(p.Hq > 0, "block_attention: Hq must be positive, got ", p.Hq);
  check(p.D > 0, "block_attention: D must be positive, got ", p.D);
  check(p.Hkv > 0 && p.Hq % p.Hkv == 0, "block_attention: Hq must be a multiple of Hkv=", p.Hkv, ", got ", p.Hq);
  check(p.D % 2 == 0 && p.D <= 256, "block_attention: D must be even and at most 256, got ", p.D);
  check(p.page_size > 0, "block_attention: k_pages must have at least one tile a page, got 0");
  check(p.Hq / p.Hkv <= 16, "block_attention: at most 16 query heads per key-value head, got ", p.Hq / p.Hkv);
  check(p.sliding_window >= 0, "block_attention: sliding_window must be at least 0, got ", p.sliding_window);
  check(p.T == 0 || p.B > 0, "block_attention: page_table must have a row for each sequence, got 0 for T=", p.T,
        " rows");
}

void check_rows(const BlockAttentionParams& p) {
  if constexpr (kBackend != Backend::kCpu) return;
  check(p.cu_rows[0] == 0 && p.cu_rows[p.B] == p.T, "block_attention: cu_rows must run from 0 to T=", p.T, ", got ",
        p.cu_rows[0], " to ", p.cu_rows[p.B]);
  for (int64_t b = 0; b < p.B; ++b)
    check(p.cu_rows[b] <= p.cu_rows[b + 1], "block_attention: cu_rows must not decrease, got ", p.cu_rows[b],
          " before ", p.cu_rows[b + 1]);
  for (int64_t b = 0; b < p.B; ++b) check_sequence(p, b);
}

// Rows of one task have one group, which stands at one place (causal rows have none); every key a task may need lies in
// [0, prefix + group) of its last row.
AttentionPlan::AttentionPlan(const BlockAttentionParams& p) {
  if constexpr (kBackend != Backend::kCpu) return;
  row_chunks.assign(p.T + 1, 0);
  for (int64_t r = 0; r < p.T; ++r)
    row_chunks[r + 1] = row_chunks[r] + static_cast<int32_t>(ceil_div(seen_keys(p, r), kAttentionChunk));
  // Heads are outermost: threads take neighbouring tasks, and each head has a full share of long and short ones. With
  // the rows outermost, 17 rows over 8192 keys took twice as long as 16.
  for (int32_t head = 0; head < p.Hkv; ++head)
    for (int32_t b = 0; b < p.B; ++b)
      for (int32_t first = p.cu_rows[b], last; first < p.cu_rows[b + 1]; first = last) {
        last = first + 1;
        while (last < p.cu_rows[b + 1] && last - first < kAttentionRows && share_a_task(p, first, last)) ++last;
        int32_t chunks = 0;
        for (int32_t r = first; r < last; ++r) chunks = std::max(chunks, row_chunks[r + 1] - row_chunks[r]);
        for (int32_t chunk = 0; chunk < chunks; ++chunk)
          tasks.push_back({b, first, last - first, head, chunk, p.row_group_begin[first], p.row_group_end[first]});
      }
}

void run(BlockAttentionParams p, const AttentionPlan& plan, Workspace& workspace) {
  if constexpr (kBackend == Backend::kCpu) {
    p.tasks = plan.tasks.data();
    p.row_chunks = plan.row_chunks.data();
    p.partial = workspace.take<float>(plan.row_chunks.back() * p.Hq * (p.D + 2));
    run_tasks(cpu::block_attention, p, static_cast<int64_t>(plan.tasks.size()));
    run_tasks(cpu::block_attention_merge, p, p.T, 8192 / (p.Hq * p.D));
  } else {
    p.partial = workspace.take<float>(gpu::block_attention_partial_size(p));
    launch_gpu("block_attention", workspace.like(), [&](void* stream) { return gpu::block_attention(p, stream); });
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) {
    m.def(
        "block_attention(Tensor q, Tensor k, Tensor v, Tensor k_pages, Tensor v_pages, Tensor page_table, "
        "Tensor cu_rows, Tensor row_positions, Tensor row_prefix, Tensor row_group_begin, Tensor row_group_end, "
        "float softmax_scale, int sliding_window) -> Tensor");
  }
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) {
  m.impl("block_attention", TORCH_BOX(&block_attention));
}

}  // namespace blockdraft
