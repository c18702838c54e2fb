#include "ops/block_attention.h"

#include "cpu/gemm.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

constexpr int64_t kTile = kAttentionTile, kChunk = kAttentionChunk;
constexpr int64_t kScores = kChunk + 32;  // a stride of 2 KB would put all queries into two sets of the L1 cache
constexpr int64_t kQueries = 64;          // query rows (rows x heads of the group) kept at once
constexpr int64_t kMaxHead = 256;         // head dimensions there is room for
constexpr float kInfinity = __builtin_inff();

// Queries of one task that go through a chunk of keys together.
template <class T>
struct Queries {
  int64_t count;
  int32_t low[kQueries], high[kQueries];  // visible positions [low, high)
  float maximum[kQueries], denominator[kQueries];
  alignas(64) RowOf<T> q[kQueries * kMaxHead];
  alignas(64) float weights[kQueries * kScores];    // scores, then weights
  alignas(64) float sums[2 * kQueries * kMaxHead];  // [panels][kQueries][even and odd keys' sums of 32 dimensions]

  float* sums_of(int64_t panel, int64_t i) { return sums + (panel * kQueries + i) * kPair; }
};

// Room for a tile that is assembled, and for the values of one as a single query sees it.
template <class T>
struct Tiles {
  alignas(64) T keys[kTile * kMaxHead];
  alignas(64) T values[kTile * kMaxHead];
  alignas(64) T visible[kTile * kMaxHead];
};

template <class T>
void load_queries(const BlockAttentionParams& p, const AttentionTask& task, int64_t first, int64_t rows,
                  Queries<T>& s) {
  const int64_t G = p.Hq / p.Hkv;
  const int32_t group = task.group_end - task.group_begin;
  s.count = rows * G;
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t row = first + i / G, head = task.head * G + i % G;
    const int64_t window = p.sliding_window ? p.row_positions[row] - p.sliding_window + 1 : 0;
    s.low[i] = static_cast<int32_t>(window > 0 ? window : 0);
    s.high[i] = p.row_prefix[row] + group;
    const T* q = static_cast<const T*>(p.q) + (row * p.Hq + head) * p.D;
    arrange_row(q, p.D, s.q + i * p.D, p.D);
  }
  for (int64_t panel = 0; panel < blocks(p.D, kPanel); ++panel)
    __builtin_memset(s.sums_of(panel, 0), 0, s.count * kPair * sizeof(float));
}

// The page's tile with position `first`.
template <class T>
const T* page_tile(const BlockAttentionParams& p, const AttentionTask& task, int32_t first, const void* pages,
                   int64_t size) {
  const int64_t page = p.page_table[task.sequence * p.M + first / p.page_size];
  const int64_t tile = (page * p.Hkv + task.head) * (p.page_size / kTile) + first % p.page_size / kTile;
  return static_cast<const T*>(pages) + tile * size;
}

// The tile whose first key stands at `first`: that of the page, or a copy with the group's rows put in and the slots
// from `high` on cleared (they hold whatever the page held before, and 0 * NaN would be NaN).
template <class T, class Write>
const T* find_tile(const BlockAttentionParams& p, const AttentionTask& task, int32_t prefix, int32_t first,
                   int32_t high, const void* pages, const void* rows, int64_t size, Write write, T* own) {
  if (first < prefix) {
    const T* tile = page_tile<T>(p, task, first, pages, size);
    if (first + kTile <= prefix) return tile;
    __builtin_memcpy(own, tile, size * sizeof(T));
  } else {
    __builtin_memset(own, 0, size * sizeof(T));
  }
  const T zeros[kMaxHead] = {};
  for (int32_t position = prefix > first ? prefix : first; position < first + kTile; ++position) {
    const int64_t source = ((task.group_begin + position - prefix) * p.Hkv + task.head) * p.D;
    write(position < high ? static_cast<const T*>(rows) + source : zeros, own, position - first, p.D);
  }
  return own;
}

template <class T>
const T* find_keys(const BlockAttentionParams& p, const AttentionTask& task, int32_t prefix, int32_t first,
                   int32_t high, T* own) {
  return find_tile(p, task, prefix, first, high, p.k_pages, p.k, kTile * p.D, write_key<T>, own);
}
template <class T>
const T* find_values(const BlockAttentionParams& p, const AttentionTask& task, int32_t prefix, int32_t first,
                     int32_t high, T* own) {
  const int64_t size = kTile * blocks(p.D, kPanel) * kPanel;
  return find_tile(p, task, prefix, first, high, p.v_pages, p.v, size, write_value<T>, own);
}

// Scores of the positions [begin, end), whole tiles, of one query become weights.
template <class T>
void softmax(Queries<T>& s, int64_t i, int32_t begin, int32_t end) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float* scores = s.weights + i * kScores;
  Vec best = splat(-kInfinity), sum = {};
  IntVec bad = {};
  for (int32_t first = begin; first < end; first += kLanes) {
    const IntVec position = lane + first;
    const Vec all = load(scores + first - begin);
    const Vec score = (position >= s.low[i]) & (position < s.high[i]) ? all : splat(-kInfinity);
    best = best < score ? score : best;
    bad |= score != score;  // `best` passes over a NaN: it must not vanish
    store(scores + first - begin, score);
  }
  const float highest = max_lanes(best), base = highest == -kInfinity ? 0 : highest;
  const Vec spoilt = splat(any_lane(bad) ? __builtin_nanf("") : 0);
  for (int32_t first = begin; first < end; first += kLanes) {
    const Vec weight = exp(load(scores + first - begin) - base) + spoilt;
    sum += weight;
    store(scores + first - begin, weight);
  }
  s.maximum[i] = highest;
  s.denominator[i] = sum_lanes(sum);
}

// sums += weights * values of a tile for queries [begin, begin + count).
template <class T>
void add_values(const BlockAttentionParams& p, Queries<T>& s, int64_t begin, int64_t count, int64_t column,
                const T* values) {
  for (int64_t panel = 0; panel < blocks(p.D, kPanel); ++panel)
    accumulate_block(s.weights + begin * kScores + column, kScores, count, values + panel * kPanel * kTile, kTile / 2,
                     s.sums_of(panel, begin));
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
void add_values_apart(const BlockAttentionParams& p, Queries<T>& s, int32_t first, int64_t column, const T* values,
                      T* own) {
  const int64_t size = kTile * blocks(p.D, kPanel) * kPanel;
  const T zeros[kMaxHead] = {};
  for (int64_t i = 0; i < s.count; ++i) {
    __builtin_memcpy(own, values, size * sizeof(T));
    for (int32_t slot = 0; slot < kTile; ++slot)
      if (first + slot < s.low[i] || first + slot >= s.high[i]) write_value(zeros, own, slot, p.D);
    add_values(p, s, i, 1, column, own);
  }
}

template <class T>
void add_tile(const BlockAttentionParams& p, Queries<T>& s, int32_t first, int64_t column, const T* values, T* own) {
  bool partly_visible = false;
  for (int64_t i = 0; i < s.count; ++i) partly_visible |= s.low[i] > first || s.high[i] < first + kTile;
  if (partly_visible && !is_finite(values, kTile * blocks(p.D, kPanel) * kPanel))
    add_values_apart(p, s, first, column, values, own);
  else
    add_values(p, s, 0, s.count, column, values);
}

template <class T>
void store_partial(const BlockAttentionParams& p, const AttentionTask& task, int64_t first, Queries<T>& s) {
  const int64_t G = p.Hq / p.Hkv;
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t row = first + i / G, head = task.head * G + i % G;
    if (task.chunk >= p.row_chunks[row + 1] - p.row_chunks[row]) continue;
    float* out = p.partial + ((p.row_chunks[row] + task.chunk) * p.Hq + head) * (p.D + 2);
    for (int64_t panel = 0; panel < blocks(p.D, kPanel); ++panel) {
      const float* sums = s.sums_of(panel, i);
      store_panel(out + panel * kPanel, {total_of(sums, sums, 0), total_of(sums, sums, 1)}, p.D - panel * kPanel);
    }
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
    int32_t begin = task.chunk * kChunk, end = begin;
    if (begin + kTile <= low) begin = minimum(low / kTile * kTile, begin + kChunk);
    for (end = begin; end < minimum((task.chunk + 1) * kChunk, high); end += kTile) {
      const T* keys = find_keys(p, task, prefix, end, high, own.keys);
      multiply_panel(s.q, p.D, s.count, keys, p.D / 2, [&](int64_t i, const Vec(&total)[2]) {
        float* scores = s.weights + i * kScores + end - begin;
        store(scores, total[0] * p.softmax_scale);
        store(scores + kLanes, total[1] * p.softmax_scale);
      });
    }
    for (int64_t i = 0; i < s.count; ++i) softmax(s, i, begin, end);
    for (int32_t tile = begin; tile < end; tile += kTile)
      add_tile(p, s, tile, tile - begin, find_values(p, task, prefix, tile, high, own.values), own.visible);
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
