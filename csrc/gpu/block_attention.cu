// Two launches: sums of each span of keys, then their merge. Nothing is known on the host but shapes, so a captured
// graph serves any lengths: the blocks find the tiles of rows, the spans of keys and with them their work from device
// data.
//
// A tile is up to kRows packed rows (rows x query heads of one key-value head) that share every key they read. Keys and
// values go from the pages straight to the registers of a matrix instruction (panel.cuh): for scores each warp has 32
// keys of a step of 128, for values 32 head dimensions. Weights travel between the two through shared memory.
//
// Bits: a row's maximum, sums and weights follow steps of 128 keys at absolute positions; chunks of kChunkKeys have
// sums of their own; kSpanChunks of them are folded in order, and the spans in order. Where a span is folded, by the
// block that computed all its chunks or by the merge, changes nothing: many tiles take whole spans, which saves most of
// the partial sums' traffic (64 rows of 132 floats beside 128 KB of keys), few tiles take chunks, which fills the GPU.
#include <limits>

#include "gpu/device/pages.cuh"
#include "gpu/device/panel.cuh"
#include "ops/block_attention.h"

namespace blockdraft::gpu {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWarpKeys = kWarpPanels * kTileKeys;
constexpr int kStepKeys = kWarps * kWarpKeys;
// One row over 4096 keys has 16 x Hkv blocks; with the CPU's 512 it would have half of them.
constexpr int kChunkKeys = 256;
constexpr int kSpanChunks = 8;
constexpr int kMaxTiles = kSpanChunks * kChunkKeys / kTileKeys;  // of keys in a span
constexpr int kWindow = kThreads;                                // rows that a block plans
constexpr int kMaxRows = kWarpSize == 32 ? 64 : 32;              // packed rows of a tile: 61 KB of shared memory, 35
constexpr int64_t kMaxPartialBytes = 512 << 20;                  // a call of more rows takes them in turns
constexpr int kMaxHead = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
static_assert(kStepKeys == 128, "the bits of both vendors' kernels follow the same steps");

// What the host decides from shapes.
struct Launch {
  int64_t first, end;  // rows
  int64_t slots;       // of partial sums per row
  int span;            // chunks of a slot: 1 or kSpanChunks
  float scale;         // of a score in units of log2
};

struct Arguments {
  BlockAttentionParams p;
  Launch l;
};

struct Row {
  int prefix, begin, low, high;  // sees the positions [low, high): high - prefix rows of its group at the end
  int sequence;
};

__device__ inline int clamp(int64_t x, int64_t low, int64_t high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

__device__ inline int find_sequence(const BlockAttentionParams& p, int64_t row) {
  int b = 0;
  for (int end = static_cast<int>(p.B); end - b > 1;) {
    const int middle = (b + end) / 2;
    (p.cu_rows[middle] <= row ? b : end) = middle;
  }
  return b;
}

__device__ inline Row find_row(const BlockAttentionParams& p, int64_t row, int sequence) {
  constexpr int64_t kMost = 1 << 30;  // positions are int32, and so must be the end of a group
  const int64_t keys = p.M * p.page_size;
  const int prefix = clamp(p.row_prefix[row], 0, keys < kMost ? keys : kMost);
  const int begin = clamp(p.row_group_begin[row], 0, p.T), end = clamp(p.row_group_end[row], begin, p.T);
  const int64_t window = p.sliding_window ? p.row_positions[row] - p.sliding_window + 1 : 0;
  const int high = prefix + end - begin;
  return {prefix, begin, clamp(window, 0, high), high, sequence};
}

// Shared memory beside queries and weights.
struct Plan {
  Row rows[kWindow];
  uint64_t starts[kWarps];
  int first[kWindow + 1];                   // of a tile; tile i ends where tile i + 1 begins
  int low[kWindow], high[kWindow];          // positions that some row of a tile sees
  int all_low[kWindow], all_high[kWindow];  // positions that all rows see
  int tiles, spans;                         // how many, and the most that one has
};
// A block's task. It lies in shared memory with what follows from it, for registers are scarce.
struct Task {
  int tile, head, slot;
  int low, high, all_low, all_high;  // of the tile
  int begin, end;                    // positions of the span
};
template <int kRows>
struct State {
  Task task;
  const void *keys[kMaxTiles], *values[kMaxTiles];  // plain tiles of the span in the pages; nullptr: gather
  int64_t partial[kRows];                           // where a packed row's sums go; -1: nowhere
  int low[kRows], high[kRows];
  float maxima[kWarps][kRows], sums[kWarps][kRows];
  float maximum[kRows], correction[kRows], reference[kRows];  // of a chunk so far
  float span_maximum[kRows], span_sum[kRows];                 // of the chunks before
  float weight_before[kRows], weight_now[kRows];              // of those and of a chunk
  alignas(16) unsigned gathered[kThreads][4];                 // a thread's own
};

__device__ inline int first_span(int low, int span) { return low / (span * kChunkKeys); }
__device__ inline int end_span(int high, int span) { return (high + span * kChunkKeys - 1) / (span * kChunkKeys); }

// Rows of a tile are neighbours in one sequence and one group, and tiles begin at multiples of `tile_rows` from the
// first row of that. Thread i decides whether row i begins one, then describes tile i.
__device__ inline void make_plan(const BlockAttentionParams& p, int64_t first, int rows, int tile_rows, int span,
                                 Plan& s) {
  const int i = threadIdx.x, lane = i % kWarpSize, warp = i / kWarpSize;
  if (i < rows) s.rows[i] = find_row(p, first + i, find_sequence(p, first + i));
  if (i == 0) s.spans = 0;
  __syncthreads();
  bool starts = i == 0;
  if (i > 0 && i < rows) {
    const Row &row = s.rows[i], &before = s.rows[i - 1];
    const int group = row.high - row.prefix;
    const int64_t base = group > 0 ? row.begin : p.cu_rows[row.sequence];
    starts = row.sequence != before.sequence || group != before.high - before.prefix ||
             (group > 0 && (row.begin != before.begin || row.prefix != before.prefix)) ||
             (first + i - base) % tile_rows == 0;
  }
  const uint64_t mine = ballot(starts);
  if (lane == 0) s.starts[warp] = mine;
  __syncthreads();
  int tiles = 0, before = __popcll(mine & ((uint64_t{1} << lane) - 1));
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before += tiles;
    tiles += __popcll(s.starts[w]);
  }
  if (starts) s.first[before] = i;
  if (i == 0) s.first[tiles] = rows, s.tiles = tiles;
  __syncthreads();
  if (i < tiles) {
    Row all = s.rows[s.first[i]];
    int low = all.low, high = all.high;
    for (int j = s.first[i] + 1; j < s.first[i + 1]; ++j) {
      const Row& row = s.rows[j];
      low = row.low < low ? row.low : low, high = row.high > high ? row.high : high;
      all.low = row.low > all.low ? row.low : all.low, all.high = row.high < all.high ? row.high : all.high;
    }
    s.low[i] = low, s.high[i] = high, s.all_low[i] = all.low, s.all_high[i] = all.high;
    atomicMax(&s.spans, end_span(high, span) - first_span(low, span));
  }
  __syncthreads();
}

// 32 keys of a head, or their values: a tile of the pages, or rows of this call at its end.
template <class T>
struct Source {
  const T* page;          // nullptr: zeros
  const T* rows;          // k or v of this call, from the head on
  int64_t first, stride;  // row of key 0, and elements between rows
  int in_page, end;       // keys [0, in_page) are the page's, keys [in_page, end) rows, the others zeros

  // What the row of a key is, where in_page <= key < end.
  __device__ const T* row(int key) const { return rows + (first + key) * stride; }
};

// Pair `pair` of a key.
__device__ inline unsigned key_pair(const Source<BFloat16>& s, int key, int pair, int64_t D) {
  const BFloat16* at = nullptr;  // d and the one behind it are neighbours in a page and in a row
  if (key < s.in_page)
    at = s.page ? s.page + pair * kPair + 2 * key : nullptr;
  else if (key < s.end)
    at = s.row(key) + 2 * pair;
  return at && 2 * pair < D ? *reinterpret_cast<const unsigned*>(at) : 0;
}

template <class T>
__device__ T value_of(const Source<T>& s, int key, int64_t d, int64_t D) {
  if (d >= D || key >= s.end || (key < s.in_page && !s.page)) return from_float<T>(0);
  return key < s.in_page ? s.page[value_place<T>(key, d)] : s.row(key)[d];
}
// Output d of keys 2 pair and 2 pair + 1.
__device__ inline unsigned value_pair(const Source<BFloat16>& s, int pair, int64_t d, int64_t D) {
  return value_of(s, 2 * pair, d, D).bits | static_cast<unsigned>(value_of(s, 2 * pair + 1, d, D).bits) << 16;
}

// Clears what is not finite and says whether there was any.
__device__ inline bool clear_odd(float& x) {
  const bool odd = !(fabsf(x) < kInfinity);
  if (odd) x = 0;
  return odd;
}
__device__ inline bool clear_odd(unsigned& pair) {
  const bool low = (pair & 0x7f80) == 0x7f80, high = (pair & 0x7f800000) == 0x7f800000;
  if (low) pair &= 0xffff0000;
  if (high) pair &= 0xffff;
  return low || high;
}
template <class Four>
__device__ bool clear_odd(Four& x) {
  const bool a = clear_odd(x.x), b = clear_odd(x.y), c = clear_odd(x.z), d = clear_odd(x.w);
  return a || b || c || d;
}

// Queries and weights in shared memory. In bfloat16 the 16-byte units of a row lie in an order that its low bits say:
// the loads of 8 rows by 4 units and the stores of 4 rows by 4 half units meet different banks.
template <class T, int kRows, int kHead>
struct Shared {
  static constexpr int kWeights = sizeof(T) == 2 ? 2 * kStepKeys : kStepKeys;  // of a row; high parts, then low ones
  static constexpr int kBytes = kRows * (kHead + kWeights) * sizeof(T);

  T* memory;

  __device__ static int in_row(int row, int k) {
    return sizeof(T) == 2 ? (k & ~63) + ((k & 63) ^ (row & 6) << 3 ^ (row & 1) << 5) : k;
  }
  // Row + further as the address of a row and a constant: a multiple of 8 rows further the order is the same.
  __device__ T* query(int row, int further, int k) const {  // zeros from D on
    return memory + row * kHead + in_row(row, k) + further * kHead;
  }
  __device__ T* weight(int row, int further, int key) const {
    return memory + kRows * kHead + row * kWeights + in_row(row, key) + further * kWeights;
  }
};

// exp2 of a score's distance to the maximum; a maximum of -inf means that nothing was seen.
__device__ inline float weight_of(float maximum, float highest) {
  return maximum == -kInfinity ? 0 : exp2_flushed(maximum - highest);
}
__device__ inline float fold(float a, float weight_a, float b, float weight_b) {
  return fmaf(a, weight_a, rounded_product(b, weight_b));
}
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline float add(float a, float b) { return a + b; }

// Partial sums of a row, head and slot: the sums, padded to whole panels, then maximum and denominator.
__host__ __device__ inline int64_t partial_width(int64_t D) { return (D + kPanel - 1) / kPanel * kPanel + 4; }
__device__ inline int64_t partial_at(const BlockAttentionParams& p, const Launch& l, int64_t row, int64_t slot,
                                     int64_t head) {
  return (((row - l.first) * l.slots + slot) * p.Hq + head) * partial_width(p.D);
}

// Sums with a maximum and a denominator, and others folded into them in order. The caller's lanes share the elements.
template <int kCount>
struct Folded {
  float sums[kCount];
  float maximum, denominator;
  bool any = false;

  __device__ void add(const float* part, int D, int lane, int lanes, float part_maximum, float part_denominator) {
    const float highest = any ? fmaxf(maximum, part_maximum) : part_maximum;
    const float before = weight_of(maximum, highest), now = weight_of(part_maximum, highest);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float x = lane + i * lanes < D ? part[lane + i * lanes] : 0;
      sums[i] = any ? fold(sums[i], before, x, now) : x;
    }
    denominator = any ? fold(denominator, before, part_denominator, now) : part_denominator;
    maximum = highest;
    any = true;
  }

  __device__ void store(float* out, int D, int lane, int lanes) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (lane + i * lanes < D) out[lane + i * lanes] = sums[i];
    if (lane == 0) out[kMaxHead] = maximum, out[kMaxHead + 1] = denominator;
  }
};

// One block's work on one tile of rows, one key-value head and one span of keys. kLoads: loads side by side that a warp
// needs for its head dimensions.
template <class T, int kRows, int kLoads>
struct Block {
  using Scores = PanelSums<T, kWarpPanels, kRows>;
  using Sums = PanelSums<T, kLoads * kWarpPanels, kRows>;
  static constexpr bool kMatrix = sizeof(T) == 2;
  static constexpr int kHead = kLoads * kStepKeys;  // head dimensions it has room for
  static constexpr int kKeySteps = kLoads * 4;      // of 32 head dimensions
  static constexpr int kLaneRows = Scores::kLaneRows;
  // The next step's keys travel while this one's values are multiplied: 8 KB a warp in registers. With more rows or a
  // larger head there are none left; they travel as far as the L2 cache then.
  static constexpr bool kAhead = kMatrix && kLoads == 1 && kRows <= 16;

  const BlockAttentionParams& p;
  const Launch& l;
  const Plan& plan;
  State<kRows>& s;
  Shared<T, kRows, kHead> shared;
  int D;  // these two from the kernel's own arguments, for they are asked for in every step
  float scale;
  Sums sums;
  uint4 keys[kAhead ? 4 * kKeySteps : 1];  // of the next step, on their way

  __device__ static int warp() { return threadIdx.x / kWarpSize; }
  // Later rows have more keys before them: their blocks go first.
  __device__ static int64_t window(const Launch& l) {
    return l.first + (gridDim.y - 1 - blockIdx.y) * int64_t{kWindow};
  }

  // Tiles are innermost: those of one sequence read the same keys at the same time.
  __device__ void run(unsigned task) {
    const int tile = task % plan.tiles, head = task / plan.tiles % static_cast<unsigned>(p.Hkv);
    const int slot = first_span(plan.low[tile], l.span) + task / plan.tiles / static_cast<unsigned>(p.Hkv);
    if (slot >= end_span(plan.high[tile], l.span)) return;
    __syncthreads();  // the task before is through with its own
    if (threadIdx.x == 0) s.task = describe(tile, head, slot);
    __syncthreads();
    load_tiles();
    load_rows();
    __syncthreads();

    int step = s.task.begin;
    while (step + kStepKeys <= s.task.low) step += kStepKeys;
    if constexpr (kAhead) load_ahead(step);
    for (int chunk = 0; step < s.task.end; ++chunk) {
      sums = {};
      bool starts = true;
      do {
        attend(step, starts);
        step += kStepKeys, starts = false;
      } while (step < s.task.end && step % kChunkKeys != 0);
      finish_chunk(chunk);
    }
  }

  __device__ Task describe(int tile, int head, int slot) const {
    const int keys = l.span * kChunkKeys, begin = slot * keys, high = plan.high[tile];
    return {tile,
            head,
            slot,
            plan.low[tile],
            high,
            plan.all_low[tile],
            plan.all_high[tile],
            begin,
            high < begin + keys ? high : begin + keys};
  }

  // A plain tile of 32 keys is one of a page, and the head is a multiple of 32: a lane needs one address for it and has
  // nothing to ask. The others are a group's last tiles and those of odd heads.
  __device__ void load_tiles() {
    for (int i = threadIdx.x; i < l.span * kChunkKeys / kTileKeys; i += kThreads) {
      const int position = s.task.begin + i * kTileKeys;
      s.keys[i] = s.values[i] = nullptr;
      if (position >= s.task.end || p.D % kPanel != 0) continue;
      const Source<T> k = source(position, false), v = source(position, true);
      if (k.in_page == kTileKeys) s.keys[i] = k.page, s.values[i] = v.page;
    }
  }
  __device__ const T* plain(const void* const* tiles, int position) const {
    return static_cast<const T*>(tiles[(position - s.task.begin) / kTileKeys]);
  }

  // The 32 keys, or values, at `position`.
  __device__ Source<T> source(int position, bool values) const {
    const Row& row = plan.rows[plan.first[s.task.tile]];
    const bool has_group = row.high > row.prefix;
    const int prefix = has_group ? row.prefix : s.task.high, at = position / kTileKeys;
    const int page_tiles = static_cast<int>(p.page_size / kTileKeys);
    const int64_t page = position < prefix ? p.page_table[row.sequence * p.M + at / page_tiles] : -1;
    const int64_t in_pages = (page * p.Hkv + s.task.head) * page_tiles + at % page_tiles;
    const T* pages = static_cast<const T*>(values ? p.v_pages : p.k_pages);
    return {page >= 0 && page < p.N ? pages + in_pages * (values ? value_tile_size(p.D) : key_tile_size(p.D)) : nullptr,
            static_cast<const T*>(values ? p.v : p.k) + s.task.head * p.D,
            int64_t{row.begin} + position - prefix,
            p.Hkv * p.D,
            has_group ? clamp(prefix - position, 0, kTileKeys) : kTileKeys,
            has_group ? clamp(s.task.high - position, 0, kTileKeys) : kTileKeys};
  }

  __device__ void load_rows() {
    const int first = plan.first[s.task.tile], G = static_cast<int>(p.Hq / p.Hkv), head = s.task.head * G;
    const int rows = (plan.first[s.task.tile + 1] - first) * G;
    const T* q = static_cast<const T*>(p.q);
    const auto query = [&](int i) { return q + ((window(l) + first + i / G) * p.Hq + head + i % G) * p.D; };
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      const int row = first + (i < rows ? i / G : 0);
      s.low[i] = plan.rows[row].low, s.high[i] = plan.rows[row].high;
      s.partial[i] = i < rows ? partial_at(p, l, window(l) + row, s.task.slot, head + i % G) : -1;
    }
    if constexpr (kMatrix) {
      for (int at = threadIdx.x; at < kRows * kHead / 8; at += kThreads) {
        const int i = at / (kHead / 8), k = at % (kHead / 8) * 8;
        *reinterpret_cast<uint4*>(shared.query(i, 0, k)) =
            load_eight(i < rows ? query(i) : nullptr, k, p.D, is_aligned(q, p.D));
      }
    } else {
      for (int at = threadIdx.x; at < kRows * kHead; at += kThreads) {
        const int i = at / kHead, k = at % kHead;
        *shared.query(i, 0, k) = i < rows && k < p.D ? query(i)[k] : 0;
      }
    }
  }

  // Where the keys of a step begin for a lane.
  __device__ static int lane_keys(int step) { return step + warp() * kWarpKeys + Scores::panel() * kTileKeys; }

  // The lane's part of the keys of a step in the head dimensions from 32 n on.
  __device__ void load_keys(int step, int n, uint4 (&out)[4]) const {
    const T* tile = plain(s.keys, lane_keys(step));
    if (!tile) return gather_keys(step, n, out);
    const T* lane = tile + (n * kStepPairs + Scores::quad() * 4) * kPair + 8 * Scores::group();
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = load_streamed(lane + i * kPair);
  }
  // The same from anywhere.
  __device__ void gather_keys(int step, int n, uint4 (&out)[4]) const {
    gather(out, [&](int i, int x) {
      return key_pair(source(lane_keys(step), false), 4 * Scores::group() + x, n * kStepPairs + Scores::quad() * 4 + i,
                      p.D);
    });
  }
  // Words x of out[i], word by word through shared memory and with the code for them once: in registers alone, this
  // rare path would take those of the usual one.
  template <int kCount, class F>
  __device__ void gather(uint4 (&out)[kCount], F word) const {
    unsigned* words = s.gathered[threadIdx.x];
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
#pragma unroll 1
      for (int x = 0; x < 4; ++x) words[x] = word(i, x);
#pragma unroll
      for (int k = 0; k + 1 < kCount; ++k) out[k] = out[k + 1];
      out[kCount - 1] = *reinterpret_cast<uint4*>(words);
    }
  }

  __device__ void load_ahead(int step) {
    const T* tile = plain(s.keys, lane_keys(step));
    if (!tile)
      return gather(keys, [&](int i, int x) {
        return key_pair(source(lane_keys(step), false), 4 * Scores::group() + x,
                        i / 4 * kStepPairs + Scores::quad() * 4 + i % 4, p.D);
      });
    const T* lane = tile + Scores::quad() * 4 * kPair + 8 * Scores::group();
#pragma unroll
    for (int i = 0; i < 4 * kKeySteps; ++i)
      if (i / 4 * kPanel < D) keys[i] = load_streamed(lane + (i / 4 * kStepPairs + i % 4) * kPair);
  }

  // The warp's own tiles of keys, and of values.
  __device__ void prefetch_step(int step) const {
    constexpr int kLine = 128 / sizeof(T);
    const T *tile = plain(s.keys, lane_keys(step)), *values = plain(s.values, lane_keys(step));
    if (!tile) return;
    for (int at = threadIdx.x % kWarpSize * kLine; at < kTileKeys * D; at += kWarpSize * kLine) {
      prefetch_l2(tile + at);
      prefetch_l2(values + at);
    }
  }

  // Whether each row sees each of the keys [first, first + count).
  __device__ bool all_see(int first, int count) const {
    return first >= s.task.all_low && first + count <= s.task.all_high;
  }

  __device__ void multiply_keys(Scores& scores, int step) const {
    if constexpr (kMatrix) {
      if constexpr (kAhead) {
        multiply_keys(scores, keys);
      } else {
#pragma unroll 1
        for (int n = 0; n * kPanel < D; ++n) {
          uint4 now[4];
          load_keys(step, n, now);
          multiply_keys(scores, n, {{{now[0], now[1], now[2], now[3]}}});
        }
      }
    } else {
      const Source<T> from = source(lane_keys(step), false);
      Scores odd;  // a single chain over 256 head dimensions would be off by 1.6 times what PyTorch is
      for (int d = 0; d < p.D; d += 2) {
        scores.multiply(four_keys(from, d), 0, [&](int row) { return *shared.query(row, 0, d); });
        odd.multiply(four_keys(from, d + 1), 0, [&](int row) { return *shared.query(row, 0, d + 1); });
      }
      scores.visit([&](int r, int, float& a, float& b, float& x, float& y) {
        const float4& four = odd.sums[0][r];
        a += four.x, b += four.y, x += four.z, y += four.w;
      });
    }
  }

  __device__ void multiply_keys(Scores& scores, const uint4 (&all)[4 * kKeySteps]) const {
#pragma unroll
    for (int n = 0; n < kKeySteps; ++n)
      if (n * kPanel < D) multiply_keys(scores, n, {{{all[4 * n], all[4 * n + 1], all[4 * n + 2], all[4 * n + 3]}}});
  }
  __device__ void multiply_keys(Scores& scores, int n, const typename Scores::Weights& weights) const {
#pragma unroll
    for (int j = 0; j < Scores::kTiles; ++j) {
      const int k = 2 * (n * kStepPairs + Scores::quad() * 4);
      const T* query = shared.query(Scores::row_of_lane(), j * kTileRows, k);
      scores.multiply(weights, *reinterpret_cast<const uint4*>(query), j);
    }
  }
  __device__ static float4 four_keys(const Source<T>& s, int d) {
    float x[4];
    for (int i = 0; i < 4; ++i) {
      const int key = 4 * Scores::group() + i;
      x[i] = key >= s.end || (key < s.in_page && !s.page) ? 0
             : key < s.in_page                            ? s.page[d / 2 * kPair + in_pair<T>(key, d)]
                                                          : s.row(key)[d];
    }
    return float4{x[0], x[1], x[2], x[3]};
  }

  __device__ void attend(int step, bool starts) {
    Scores scores;
    multiply_keys(scores, step);
    if (step + kStepKeys < s.task.end) {
      if constexpr (kAhead)
        load_ahead(step + kStepKeys);
      else
        prefetch_step(step + kStepKeys);
    }

    // Scores in units of log2, -inf where a row does not see the key, and each warp's maxima.
    float highest[kLaneRows];
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) highest[r] = -kInfinity;
    const int first = step + warp() * kWarpKeys;
    const bool masked = !all_see(first, kWarpKeys);
    scores.visit([&](int r, int c, float& a, float& b, float& x, float& y) {
      a = rounded_product(a, scale), b = rounded_product(b, scale);
      x = rounded_product(x, scale), y = rounded_product(y, scale);
      if (masked) {
        const int row = Scores::row(r), from = s.low[row] - first - c, to = s.high[row] - first - c;
        if (from > 0 || to <= 0) a = -kInfinity;
        if (from > 1 || to <= 1) b = -kInfinity;
        if (from > 2 || to <= 2) x = -kInfinity;
        if (from > 3 || to <= 3) y = -kInfinity;
      }
      highest[r] = fmaxf(highest[r], fmaxf(fmaxf(a, b), fmaxf(x, y)));
    });
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      highest[r] = Scores::over_outputs(highest[r], larger);
      if (Scores::is_first()) s.maxima[warp()][Scores::row(r)] = highest[r];
    }
    __syncthreads();

    if (threadIdx.x < kRows) raise_maximum(threadIdx.x, starts);
    __syncthreads();

    // Weights, relative to the maximum of all keys of the chunk so far.
    sums.visit([&](int r, int, float& a, float& b, float& x, float& y) {
      const float correction = s.correction[Sums::row(r)];
      a *= correction, b *= correction, x *= correction, y *= correction;
    });
    float totals[kLaneRows] = {};
    scores.visit([&](int r, int c, float& a, float& b, float& x, float& y) {
      const int row = Scores::row(r);
      const float highest = s.reference[row];
      const float4 weights = {exp2_flushed(a - highest), exp2_flushed(b - highest), exp2_flushed(x - highest),
                              exp2_flushed(y - highest)};
      totals[r] += store_weights(r, warp() * kWarpKeys + c, weights);
    });
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
      const float total = Scores::over_outputs(totals[r], add);
      if (Scores::is_first()) s.sums[warp()][Scores::row(r)] += total;
    }
    __syncthreads();
    if (first_output() >= p.D) return;
    const int end = step + kStepKeys < s.task.end ? step + kStepKeys : s.task.end;
    int position = step;
    while (position + kTileKeys <= s.task.low) position += kTileKeys;
    uint4 values[4 * kLoads], next[4 * kLoads];
    if constexpr (kMatrix) load_values(position, values);
#pragma unroll 1
    while (position < end) {
      const int now = position;
      position += kTileKeys;
      if constexpr (kMatrix && kLoads == 1)
        if (position < end) load_values(position, next);
      add_values(values, now, now - step);
      if constexpr (kMatrix && kLoads > 1) {
        if (position < end) load_values(position, values);
      } else {
#pragma unroll
        for (int i = 0; i < 4 * kLoads; ++i) values[i] = next[i];
      }
    }
  }

  // The chunk's maximum of packed row i so far, and what the sums before weigh.
  __device__ void raise_maximum(int i, bool starts) {
    const float before = starts ? -kInfinity : s.maximum[i];
    float now = before;
    for (int w = 0; w < kWarps; ++w) now = fmaxf(now, s.maxima[w][i]);
    const float correction = weight_of(before, now);
    for (int w = 0; w < kWarps; ++w) s.sums[w][i] = starts ? 0 : s.sums[w][i] * correction;
    s.maximum[i] = now;
    s.correction[i] = correction;
    s.reference[i] = now == -kInfinity ? 0 : now;
  }

  // Weights of four keys of a step; returns their sum.
  __device__ float store_weights(int r, int key, float4 w) {
    constexpr int kTile = kLaneRows / Scores::kTiles;  // of the lane's rows
    const int row = Scores::row(r % kTile), further = Scores::row(r) - row;
    if constexpr (kMatrix) {
      const uint2 high = {pack_bfloat16(w.x, w.y), pack_bfloat16(w.z, w.w)};
      const float2 a = unpack_bfloat16(high.x), b = unpack_bfloat16(high.y);
      const uint2 low = {pack_bfloat16(w.x - a.x, w.y - a.y), pack_bfloat16(w.z - b.x, w.w - b.y)};
      *reinterpret_cast<uint2*>(shared.weight(row, further, key)) = high;
      *reinterpret_cast<uint2*>(shared.weight(row, further, kStepKeys + key)) = low;
    } else {
      *reinterpret_cast<float4*>(shared.weight(row, further, key)) = w;
    }
    return (w.x + w.y) + (w.z + w.w);
  }

  // The warp's first head dimension.
  __device__ static int first_output() { return warp() * kLoads * kWarpPanels * kPanel; }

  // The warp's part of the values of the 32 keys at `position`.
  __device__ void load_values(int position, uint4 (&values)[4 * kLoads]) const {
    constexpr int kNext = kWarpPanels * kPanel;  // outputs to the next load
    const int d = first_output() + Sums::panel() * kPanel + 4 * Sums::group(), pair = Sums::quad() * 4;
    if (const T* tile = plain(s.values, position)) {
      const T* lane = tile + value_place<T>(2 * pair, d);
#pragma unroll
      for (int i = 0; i < 4 * kLoads; ++i) {
        values[i] = uint4{0, 0, 0, 0};
        if (d + i / 4 * kNext < p.D) values[i] = load_streamed(lane + i / 4 * kNext * kTileKeys + i % 4 * kPair);
      }
    } else {
      gather(values, [&](int i, int x) {
        return value_pair(source(position, true), pair + i % 4, d + i / 4 * kNext + x, p.D);
      });
    }
  }

  // sums += weights x values for the 32 keys at `position`, key `at` of the step.
  __device__ void add_values(uint4 (&values)[4 * kLoads], int position, int at) {
    const bool apart = !all_see(position, kTileKeys);
    bool odd = false;
    if constexpr (kMatrix) {
      if (apart)
#pragma unroll
        for (int i = 0; i < 4 * kLoads; ++i) odd |= clear_odd(values[i]);
      typename Sums::Weights weights;
#pragma unroll
      for (int i = 0; i < 4 * kLoads; ++i) weights.pair[i / 4][i % 4] = values[i];
#pragma unroll
      for (int j = 0; j < Sums::kTiles; ++j)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int key = part * kStepKeys + at + 8 * Sums::quad();
          sums.multiply(weights,
                        *reinterpret_cast<const uint4*>(shared.weight(Sums::row_of_lane(), j * kTileRows, key)), j);
        }
    } else {
      const Source<T> from = source(position, true);
      for (int key = 0; key < kTileKeys; ++key)
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
          const int d = first_output() + (n * kWarpPanels + Sums::panel()) * kPanel + 4 * Sums::group();
          float* slot = reinterpret_cast<float*>(s.gathered[threadIdx.x]);
#pragma unroll 1
          for (int i = 0; i < 4; ++i) slot[i] = value_of(from, key, d + i, p.D);
          float4 four = *reinterpret_cast<float4*>(slot);
          if (apart) odd |= clear_odd(four);
          sums.multiply(four, n, [&](int row) { return *shared.weight(row, 0, at + key); });
        }
    }
    if (apart && ballot(odd)) add_odd_values(position);
  }

  // A weight of 0 does not hide a value that is not finite, and not every row sees this one: it was cleared, and those
  // that see it get it here.
  __device__ void add_odd_values(int position) {
    const Source<T> from = source(position, true);
    float* odd = reinterpret_cast<float*>(s.gathered[threadIdx.x]);
#pragma unroll 1
    for (int key = 0; key < kTileKeys; ++key)
      sums.visit([&](int r, int c, float& a, float& b, float& x, float& y) {
        const int row = Sums::row(r), d = first_output() + c;
        if (position + key < s.low[row] || position + key >= s.high[row]) return;
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const float value = to_float(value_of(from, key, d + i, p.D));
          odd[i] = fabsf(value) < kInfinity ? 0 : value;
        }
        a += odd[0], b += odd[1], x += odd[2], y += odd[3];
      });
  }

  // The chunk's sums, folded into those of the chunks before it in this span.
  __device__ void finish_chunk(int chunk) {
    if (threadIdx.x < kRows) fold_row(threadIdx.x, chunk);
    __syncthreads();
    sums.visit([&](int r, int c, float& a, float& b, float& x, float& y) {
      const int i = Sums::row(r), d = first_output() + c;
      if (s.partial[i] < 0 || d >= p.D) return;
      float4& out = *reinterpret_cast<float4*>(p.partial + s.partial[i] + d);
      const float before = s.weight_before[i], now = s.weight_now[i];
      out = chunk == 0 ? float4{a, b, x, y}
                       : float4{fold(out.x, before, a, now), fold(out.y, before, b, now), fold(out.z, before, x, now),
                                fold(out.w, before, y, now)};
    });
  }

  // Maximum and denominator of packed row i, and what the span's and the chunk's sums weigh.
  __device__ void fold_row(int i, int chunk) {
    float denominator = 0, maximum = s.maximum[i];
    for (int w = 0; w < kWarps; ++w) denominator += s.sums[w][i];
    if (chunk > 0) {
      const float highest = fmaxf(s.span_maximum[i], maximum);
      s.weight_before[i] = weight_of(s.span_maximum[i], highest);
      s.weight_now[i] = weight_of(maximum, highest);
      denominator = fold(s.span_sum[i], s.weight_before[i], denominator, s.weight_now[i]);
      maximum = highest;
    }
    s.span_maximum[i] = maximum;
    s.span_sum[i] = denominator;
    if (s.partial[i] < 0) return;
    float* last = p.partial + s.partial[i] + partial_width(p.D) - 4;
    last[0] = maximum, last[1] = denominator;
  }
};

template <class T, int kRows, int kLoads>
__global__ void __launch_bounds__(kThreads, kWarpSize == 32 ? 2 : 1)
    block_attention_kernel(BlockAttentionParams params, Launch launch) {
  __shared__ Arguments arguments;  // read where they are needed: AMD's scalar registers do not hold them all
  if (threadIdx.x == 0) arguments.p = params, arguments.l = launch;
  __syncthreads();
  const BlockAttentionParams& p = arguments.p;
  const Launch& l = arguments.l;
  __shared__ Plan plan;
  __shared__ State<kRows> state;
  BLOCKDRAFT_DYNAMIC_SHARED(T, memory);
  using Work = Block<T, kRows, kLoads>;
  const int64_t first = Work::window(l);
  make_plan(p, first, static_cast<int>(l.end - first < kWindow ? l.end - first : kWindow),
            kRows / static_cast<int>(p.Hq / p.Hkv), l.span, plan);
  for (unsigned task = blockIdx.x; task < plan.spans * plan.tiles * static_cast<unsigned>(p.Hkv); task += gridDim.x)
    Work{p, l, plan, state, {memory}, static_cast<int>(params.D), launch.scale}.run(task);
}

// One block per row and query head. Each warp folds the chunks of a span, then the block folds the spans.
template <class T>
__global__ void __launch_bounds__(kThreads) block_attention_merge_kernel(BlockAttentionParams p, Launch l) {
  constexpr int kLaneSums = kMaxHead / kWarpSize, kThreadSums = kMaxHead / kThreads;
  __shared__ float spans[kWarps][kMaxHead + 2];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, D = static_cast<int>(p.D);
  const int64_t row = l.first + blockIdx.x / static_cast<unsigned>(p.Hq),
                head = blockIdx.x % static_cast<unsigned>(p.Hq);
  const Row seen = find_row(p, row, 0);
  const int slot_keys = l.span * kChunkKeys, slots = kSpanChunks / l.span;  // of a span
  const int begin = seen.low / slot_keys, end = (seen.high + slot_keys - 1) / slot_keys;
  Folded<kThreadSums> total;
  for (int first = begin / slots; first * slots < end; first += kWarps) {
    Folded<kLaneSums> span;
#pragma unroll
    for (int i = 0; i < kSpanChunks; ++i) {
      const int slot = (first + warp) * slots + i;
      if (i >= slots || slot < begin || slot >= end) continue;
      const float* part = p.partial + partial_at(p, l, row, slot, head);
      const float* last = part + partial_width(p.D) - 4;
      span.add(part, D, lane, kWarpSize, last[0], last[1]);
    }
    span.store(spans[warp], D, lane, kWarpSize);
    __syncthreads();
    for (int w = 0; w < kWarps && (first + w) * slots < end; ++w)
      total.add(spans[w], D, threadIdx.x, kThreads, spans[w][kMaxHead], spans[w][kMaxHead + 1]);
    __syncthreads();
  }
  T* out = static_cast<T*>(p.out) + (row * p.Hq + head) * p.D;
  for (int i = 0; i < kThreadSums; ++i) {
    const int d = threadIdx.x + i * kThreads;
    if (d < D) out[d] = from_float<T>(seen.high > seen.low ? total.sums[i] / total.denominator : 0);
  }
}

// The host's part.

// Rows of a tile: no more than the sequences have on average, for a matrix instruction takes empty rows as long.
int packed_rows(const BlockAttentionParams& p) {
  const int64_t wanted = (p.T + p.B - 1) / p.B * (p.Hq / p.Hkv);
  if (p.dtype == DType::kFloat32 || p.D > kMaxHead / 2) return 16;
  int rows = kTileRows;
  while (rows < kMaxRows && (rows < wanted || rows < p.Hq / p.Hkv)) rows *= 2;
  return rows;
}

Launch plan_launch(const BlockAttentionParams& p) {
  const int64_t tile_rows = packed_rows(p) / (p.Hq / p.Hkv), row_tiles = (p.T + tile_rows - 1) / tile_rows;
  const int64_t tiles = (row_tiles < p.B ? p.B : row_tiles) * p.Hkv;
  const int64_t chunks = (p.M * p.page_size + p.T + kChunkKeys - 1) / kChunkKeys;  // a group is part of the call
  const int64_t spans = (chunks + kSpanChunks - 1) / kSpanChunks, slot_bytes = p.Hq * partial_width(p.D) * 4;
  const bool whole = tiles * spans >= 2 * multiprocessors() || p.T * chunks * slot_bytes > kMaxPartialBytes;
  Launch l = {0, p.T, whole ? spans : chunks, whole ? kSpanChunks : 1, p.softmax_scale * 1.44269504f};
  const int64_t most = kMaxPartialBytes / (l.slots * slot_bytes);
  if (most < p.T) l.end = most < 1 ? 1 : most;
  return l;
}

template <class T, int kRows, int kLoads>
void launch_tiles(const BlockAttentionParams& p, const Launch& l, void* stream) {
  constexpr auto kernel = block_attention_kernel<T, kRows, kLoads>;
  const int64_t rows = l.end - l.first, windows = (rows + kWindow - 1) / kWindow;
  const int64_t resident = multiprocessors() * (kRows < 32 ? 4 : 2) / windows;
  const int64_t tasks = (rows < kWindow ? rows : kWindow) * p.Hkv * l.slots, wanted = resident < 32 ? 32 : resident;
  constexpr size_t bytes = Shared<T, kRows, kLoads * kStepKeys>::kBytes;
  allow_shared(kernel, bytes);
  BLOCKDRAFT_LAUNCH(kernel,
                    dim3(static_cast<unsigned>(tasks < wanted ? tasks : wanted), static_cast<unsigned>(windows)),
                    dim3(kThreads), bytes, stream, p, l);
}

template <class T>
void launch(const BlockAttentionParams& p, const Launch& l, void* stream) {
  if (p.D > kMaxHead / 2) {
    launch_tiles<T, 16, 2>(p, l, stream);
  } else if constexpr (sizeof(T) == 4) {
    launch_tiles<T, 16, 1>(p, l, stream);
  } else {
    const int rows = packed_rows(p);
    if (rows == 16) launch_tiles<T, 16, 1>(p, l, stream);
    if (rows == 32) launch_tiles<T, 32, 1>(p, l, stream);
    if constexpr (kTileRows == 8) {
      if (rows == 8) launch_tiles<T, 8, 1>(p, l, stream);
      if (rows == 64) launch_tiles<T, 64, 1>(p, l, stream);
    }
  }
  BLOCKDRAFT_LAUNCH(block_attention_merge_kernel<T>, dim3(static_cast<unsigned>((l.end - l.first) * p.Hq)),
                    dim3(kThreads), 0, stream, p, l);
}

}  // namespace

int64_t block_attention_partial_size(const BlockAttentionParams& p) {
  const Launch l = plan_launch(p);
  return l.end * l.slots * p.Hq * partial_width(p.D);
}

const char* block_attention(const BlockAttentionParams& p, void* stream) {
  Launch l = plan_launch(p);
  for (const int64_t rows = l.end; l.first < p.T; l.first = l.end, l.end += rows) {
    if (l.end > p.T) l.end = p.T;
    visit_dtype(p.dtype, [&](auto tag) { launch<decltype(tag)>(p, l, stream); });
  }
  return last_error();
}

}  // namespace blockdraft::gpu
