#include "ops/block_attention.h"

#include "cpu/gemm.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

constexpr int64_t kTile = kAttentionTile;
constexpr int64_t kQueries = 64;   // query rows (rows x heads of the group) kept at once
constexpr int64_t kMaxHead = 256;  // head dimensions there is room for
constexpr float kInfinity = __builtin_inff();

// Queries of one task that go through the keys together, and their running softmax.
template <class T>
struct Queries {
  int64_t count;
  int32_t low[kQueries], high[kQueries];  // visible positions [low, high)
  float maximum[kQueries], denominator[kQueries], correction[kQueries];
  alignas(64) RowOf<T> q[kQueries * kMaxHead];
  alignas(64) float sums[kQueries * kMaxHead];  // [count][panels * 32]
  alignas(64) float scores[kQueries * kTile];
};

// Room for a tile that is assembled, and for the values of one as a single query sees it.
template <class T>
struct Tiles {
  alignas(64) T keys[kTile * kMaxHead];
  alignas(64) T values[kTile * kMaxHead];
  alignas(64) T visible[kTile * kMaxHead];
};

template <class T>
void load_queries(const BlockAttentionParams& p, const AttentionTask& task, int64_t first, int64_t rows, Queries<T>& s) {
  const int64_t G = p.Hq / p.Hkv, panels = blocks(p.D, kPanel);
  const int32_t group = task.group_end - task.group_begin;
  s.count = rows * G;
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t row = first + i / G, head = task.head * G + i % G;
    const int64_t window = p.sliding_window ? p.row_positions[row] - p.sliding_window + 1 : 0;
    s.low[i] = static_cast<int32_t>(window > 0 ? window : 0);
    s.high[i] = p.row_prefix[row] + group;
    s.maximum[i] = -kInfinity;
    s.denominator[i] = 0;
    const T* q = static_cast<const T*>(p.q) + (row * p.Hq + head) * p.D;
    arrange_row(q, p.D, s.q + i * p.D, p.D);
  }
  __builtin_memset(s.sums, 0, s.count * panels * kPanel * sizeof(float));
}

// The tile whose first key stands at `first`: that of the page, or a copy with the group's rows put in and the slots
// from `high` on cleared (they hold whatever the page held before, and 0 * NaN would be NaN).
template <class T>
void find_tile(const BlockAttentionParams& p, const AttentionTask& task, int32_t prefix, int32_t first, int32_t high,
               Tiles<T>& own, const T** keys, const T** values) {
  const int64_t tiles = p.page_size / kTile, k_size = kTile * p.D, v_size = kTile * blocks(p.D, kPanel) * kPanel;
  if (first < prefix) {
    const int64_t page = p.page_table[task.sequence * p.M + first / p.page_size];
    const int64_t tile = (page * p.Hkv + task.head) * tiles + first % p.page_size / kTile;
    *keys = static_cast<const T*>(p.k_pages) + tile * k_size;
    *values = static_cast<const T*>(p.v_pages) + tile * v_size;
    if (first + kTile <= prefix) return;
    __builtin_memcpy(own.keys, *keys, k_size * sizeof(T));
    __builtin_memcpy(own.values, *values, v_size * sizeof(T));
  } else {
    __builtin_memset(own.keys, 0, k_size * sizeof(T));
    __builtin_memset(own.values, 0, v_size * sizeof(T));
  }
  const T zeros[kMaxHead] = {};
  for (int32_t position = prefix > first ? prefix : first; position < first + kTile; ++position) {
    const int64_t row = task.group_begin + position - prefix;
    const bool in_group = position < high;
    const int64_t source = (row * p.Hkv + task.head) * p.D;
    write_key(in_group ? static_cast<const T*>(p.k) + source : zeros, own.keys, position - first, p.D);
    write_value(in_group ? static_cast<const T*>(p.v) + source : zeros, own.values, position - first, p.D);
  }
  *keys = own.keys;
  *values = own.values;
}

// Running softmax of one query over a tile: scores become weights.
template <class T>
void update_softmax(Queries<T>& s, int64_t i, int32_t first) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec score[2];
  for (int j = 0; j < 2; ++j) {
    const IntVec position = lane + (first + j * static_cast<int32_t>(kLanes));
    score[j] = load(s.scores + i * kTile + j * kLanes);
    score[j] = (position >= s.low[i]) & (position < s.high[i]) ? score[j] : splat(-kInfinity);
  }
  const float highest = maximum(s.maximum[i], maximum(max_lanes(score[0]), max_lanes(score[1])));
  s.correction[i] = 1;
  Vec weight[2] = {};
  if (any_lane((score[0] != score[0]) | (score[1] != score[1]))) {  // `maximum` passes over a NaN: it must not vanish
    weight[0] = splat(__builtin_nanf(""));
  } else if (highest != -kInfinity) {
    s.correction[i] = exp(s.maximum[i] - highest);
    for (int j = 0; j < 2; ++j) weight[j] = exp(score[j] - highest);
  }
  s.maximum[i] = highest;
  s.denominator[i] = s.denominator[i] * s.correction[i] + sum_lanes(weight[0] + weight[1]);
  for (int j = 0; j < 2; ++j) store(s.scores + i * kTile + j * kLanes, weight[j]);
}

// sums = sums * correction + weights * values for queries [begin, begin + count).
template <class T>
void add_values(const BlockAttentionParams& p, Queries<T>& s, int64_t begin, int64_t count, const T* values) {
  const int64_t panels = blocks(p.D, kPanel), width = panels * kPanel;
  for (int64_t panel = 0; panel < panels; ++panel)
    multiply_panel(s.scores + begin * kTile, kTile, count, values + panel * kPanel * kTile, kTile / 2,
                   [&](int64_t i, const Vec(&total)[2]) {
                     float* sums = s.sums + (begin + i) * width + panel * kPanel;
                     for (int j = 0; j < 2; ++j)
                       store(sums + j * kLanes, load(sums + j * kLanes) * s.correction[begin + i] + total[j]);
                   });
}

template <class T>
bool is_finite(const T* values, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= widen(values[i]) * 0 == 0;
  return finite;
}

// A weight of 0 does not hide a value that is not finite. Where a tile has one and a query does not see all of the
// tile, each query gets a copy in which what it does not see is cleared: another row's NaN stays in that row.
template <class T>
void add_values_apart(const BlockAttentionParams& p, Queries<T>& s, int32_t first, const T* values, T* own) {
  const int64_t size = kTile * blocks(p.D, kPanel) * kPanel;
  const T zeros[kMaxHead] = {};
  for (int64_t i = 0; i < s.count; ++i) {
    __builtin_memcpy(own, values, size * sizeof(T));
    for (int32_t slot = 0; slot < kTile; ++slot)
      if (first + slot < s.low[i] || first + slot >= s.high[i]) write_value(zeros, own, slot, p.D);
    add_values(p, s, i, 1, own);
  }
}

template <class T>
void attend_tile(const BlockAttentionParams& p, Queries<T>& s, int32_t first, const T* keys, const T* values, T* own) {
  multiply_panel(s.q, p.D, s.count, keys, p.D / 2, [&](int64_t i, const Vec(&total)[2]) {
    store(s.scores + i * kTile, total[0] * p.softmax_scale);
    store(s.scores + i * kTile + kLanes, total[1] * p.softmax_scale);
  });
  bool partly_visible = false;
  for (int64_t i = 0; i < s.count; ++i) {
    update_softmax(s, i, first);
    partly_visible |= s.low[i] > first || s.high[i] < first + kTile;
  }
  if (partly_visible && !is_finite(values, kTile * blocks(p.D, kPanel) * kPanel))
    add_values_apart(p, s, first, values, own);
  else
    add_values(p, s, 0, s.count, values);
}

template <class T>
void store_partial(const BlockAttentionParams& p, const AttentionTask& task, int64_t first, const Queries<T>& s) {
  const int64_t G = p.Hq / p.Hkv, width = blocks(p.D, kPanel) * kPanel;
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t row = first + i / G, head = task.head * G + i % G;
    if (task.chunk >= p.row_chunks[row + 1] - p.row_chunks[row]) continue;
    float* out = p.partial + ((p.row_chunks[row] + task.chunk) * p.Hq + head) * (p.D + 2);
    for (int64_t d = 0; d < p.D; ++d) out[d] = s.sums[i * width + d];
    out[p.D] = s.maximum[i];
    out[p.D + 1] = s.denominator[i];
  }
}

template <class T>
void attend(const BlockAttentionParams& p, const AttentionTask& task) {
  const int64_t G = p.Hq / p.Hkv, step = kQueries / G;
  Queries<T> s;
  Tiles<T> own;
  for (int64_t first = task.first_row; first < task.first_row + task.rows; first += step) {
    load_queries<T>(p, task, first, minimum(step, task.first_row + task.rows - first), s);
    int32_t low = s.low[0], high = s.high[0];
    for (int64_t i = 1; i < s.count; ++i)
      low = s.low[i] < low ? s.low[i] : low, high = s.high[i] > high ? s.high[i] : high;
    const int32_t prefix = high - (task.group_end - task.group_begin);
    const int32_t begin = task.chunk * kAttentionChunk,
                  end = static_cast<int32_t>(minimum(begin + kAttentionChunk, high));
    for (int32_t tile = begin; tile < end; tile += kTile) {
      if (tile + kTile <= low) continue;
      const T *keys, *values;
      find_tile(p, task, prefix, tile, high, own, &keys, &values);
      attend_tile(p, s, tile, keys, values, own.visible);
    }
    store_partial(p, task, first, s);
  }
}

template <class T>
void merge_row(const BlockAttentionParams& p, int64_t row) {
  const int64_t chunks = p.row_chunks[row + 1] - p.row_chunks[row], size = p.D + 2;
  for (int64_t head = 0; head < p.Hq; ++head) {
    const float* partial = p.partial + (p.row_chunks[row] * p.Hq + head) * size;
    float highest = -kInfinity, denominator = 0, sums[kMaxHead] = {};
    for (int64_t c = 0; c < chunks; ++c) highest = maximum(highest, partial[c * p.Hq * size + p.D]);
    for (int64_t c = 0; c < chunks; ++c) {
      const float* chunk = partial + c * p.Hq * size;
      const float weight = exp(chunk[p.D] - highest);
      denominator += weight * chunk[p.D + 1];
      for (int64_t d = 0; d < p.D; ++d) sums[d] += weight * chunk[d];
    }
    T* out = static_cast<T*>(p.out) + (row * p.Hq + head) * p.D;
    for (int64_t d = 0; d < p.D; ++d) narrow(sums[d] / denominator, out + d);
  }
}

}  // namespace

void block_attention(const BlockAttentionParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.dtype == DType::kBFloat16)
      attend<BFloat16>(p, p.tasks[i]);
    else
      attend<float>(p, p.tasks[i]);
  }
}

void block_attention_merge(const BlockAttentionParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.dtype == DType::kBFloat16)
      merge_row<BFloat16>(p, row);
    else
      merge_row<float>(p, row);
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
