#include "ops/block_attention.h"

#include <vector>

#include "common/host.h"

namespace blockdraft {
namespace {

struct Plan {
  std::vector<AttentionTask> tasks;
  std::vector<int32_t> row_chunks;
};

// Rows of one task have one group, which stands at one place (causal rows have none); every key a task may need lies in
// [0, prefix + group) of its last row.
Plan make_plan(const int32_t* cu_rows, const int32_t* row_prefix, const int32_t* begins, const int32_t* ends, int64_t B,
               int64_t T, int64_t Hkv) {
  Plan plan;
  plan.row_chunks.assign(T + 1, 0);
  for (int64_t r = 0; r < T; ++r)
    plan.row_chunks[r + 1] =
        plan.row_chunks[r] + static_cast<int32_t>(ceil_div(row_prefix[r] + ends[r] - begins[r], kAttentionChunk));
  // Heads are outermost: threads take neighbouring tasks, and each head has a full share of long and short ones. With
  // the rows outermost, 17 rows over 8192 keys took twice as long as 16.
  for (int32_t head = 0; head < Hkv; ++head)
    for (int32_t b = 0; b < B; ++b)
      for (int32_t first = cu_rows[b], last; first < cu_rows[b + 1]; first = last) {
        last = first + 1;
        while (last < cu_rows[b + 1] && last - first < kAttentionRows && begins[last] == begins[first] &&
               ends[last] == ends[first] && (begins[first] == ends[first] || row_prefix[last] == row_prefix[first]))
          ++last;
        int32_t chunks = 0;
        for (int32_t r = first; r < last; ++r) chunks = std::max(chunks, plan.row_chunks[r + 1] - plan.row_chunks[r]);
        for (int32_t chunk = 0; chunk < chunks; ++chunk)
          plan.tasks.push_back({b, first, last - first, head, chunk, begins[first], ends[first]});
      }
  return plan;
}

void check_rows(const int32_t* cu_rows, const int32_t* row_prefix, const int32_t* begins, const int32_t* ends,
                const int32_t* page_table, int64_t B, int64_t T, int64_t M, int64_t N, int64_t page_size) {
  check(cu_rows[0] == 0 && cu_rows[B] == T, "block_attention: cu_rows must run from 0 to T=", T, ", got ", cu_rows[0],
        " to ", cu_rows[B]);
  for (int64_t b = 0; b < B; ++b)
    check(cu_rows[b] <= cu_rows[b + 1], "block_attention: cu_rows must not decrease, got ", cu_rows[b], " before ",
          cu_rows[b + 1]);
  for (int64_t b = 0; b < B; ++b) {
    int64_t longest = 0;
    for (int64_t r = cu_rows[b]; r < cu_rows[b + 1]; ++r) {
      check(row_prefix[r] >= 0 && row_prefix[r] <= M * page_size, "block_attention: row_prefix must be in [0, ",
            M * page_size, "], got ", row_prefix[r], " at ", r);
      check(cu_rows[b] <= begins[r] && begins[r] <= ends[r] && ends[r] <= cu_rows[b + 1],
            "block_attention: the group of row ", r, " must lie in the rows of its sequence, got [", begins[r], ", ",
            ends[r], ")");
      check(row_prefix[r] + ends[r] - begins[r] > 0, "block_attention: row ", r, " must see at least one key, got 0");
      longest = std::max<int64_t>(longest, row_prefix[r]);
    }
    for (int64_t i = 0; i < ceil_div(longest, page_size); ++i)
      check(page_table[b * M + i] >= 0 && page_table[b * M + i] < N, "block_attention: page_table must be in [0, ",
            N - 1, "], got ", page_table[b * M + i], " at [", b, ", ", i, "]");
  }
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
  check(Hq > 0, "block_attention: Hq must be positive, got ", Hq.size);
  check(D > 0, "block_attention: D must be positive, got ", D.size);
  check(Hkv > 0 && Hq % Hkv == 0, "block_attention: Hq must be a multiple of Hkv=", Hkv.size, ", got ", Hq.size);
  check(D % 2 == 0 && D <= 256, "block_attention: D must be even and at most 256, got ", D.size);
  check(tiles > 0, "block_attention: k_pages must have at least one tile a page, got 0");
  checker.size("last size of k_pages", k_size, kAttentionTile * D);
  checker.size("last size of v_pages", v_size, kAttentionTile * ceil_div(D, kPanelOutputs) * kPanelOutputs);
  check(Hq / Hkv <= 16, "block_attention: at most 16 query heads per key-value head, got ", Hq / Hkv);
  check(sliding_window >= 0, "block_attention: sliding_window must be at least 0, got ", sliding_window);

  check(T == 0 || B > 0, "block_attention: page_table must have a row for each sequence, got 0 for T=", T.size,
        " rows");

  Tensor out = torch::stable::empty_like(q);
  if (T == 0) return out;
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
                         .out = out.mutable_data_ptr(),
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
  if constexpr (kBackend == Backend::kCpu) {
    check_rows(p.cu_rows, p.row_prefix, p.row_group_begin, p.row_group_end, p.page_table, B, T, M, N, p.page_size);
    const Plan plan = make_plan(p.cu_rows, p.row_prefix, p.row_group_begin, p.row_group_end, B, T, Hkv);
    const Tensor partial = scratch(q, {plan.row_chunks.back(), Hq, D + 2});
    p.tasks = plan.tasks.data();
    p.row_chunks = plan.row_chunks.data();
    p.partial = write<float>(partial);
    run_tasks(cpu::block_attention, p, static_cast<int64_t>(plan.tasks.size()));
    run_tasks(cpu::block_attention_merge, p, T, 8192 / (Hq * D));
  } else {
    const Tensor partial = scratch(q, {gpu::block_attention_partial_size(p)});
    p.partial = write<float>(partial);
    launch_gpu("block_attention", q, [&](void* stream) { return gpu::block_attention(p, stream); });
  }
  return out;
}

}  // namespace

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
