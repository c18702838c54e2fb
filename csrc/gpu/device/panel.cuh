#pragma once
// The matrix product under every GPU kernel: rows of x [.., K] against packed panels of 32 outputs, packed as for the
// CPU (ops/pack_weight.h): a pair is two neighbouring k of 32 outputs, a panel its pairs one after the other.
//
// A load of 16 bytes gives a lane one pair of four neighbouring outputs, and a warp four runs of 128 bytes (NVIDIA:
// four pairs of a panel) or eight (AMD: of two panels). Both operands of a matrix instruction may have their k in any
// order, if it is the same one, and the outputs too: so these registers are operands as they come, without shared
// memory.
//
//   lane -> group, the outputs 4 group .. 4 group + 3, and quad, the pairs 4 quad .. 4 quad + 3 of a step of 16
//   16 bytes of a row of x: the same four pairs; pairs 0 and 1 are for a first instruction, 2 and 3 for a second one
//   output c of the four: row group (c even) or group + 8 (c odd) of tile c / 2 (NVIDIA); row of tile c (AMD)
//
// Bits: a sum runs over every kWarps-th step of 32 k in one warp, then over the warps in order. Neither the number of
// rows nor their place enters, so a row has the same bits in any company.
#include "gpu/device/mma.cuh"

namespace blockdraft::gpu {

constexpr int kPanel = 32, kPair = 64;           // outputs of a panel, values of a pair
constexpr int kStepPairs = 16;                   // pairs of a step
constexpr int kWarpPanels = kWarpSize / kPanel;  // panels of a warp's load
constexpr int kTileRows = kWarpSize == 32 ? 8 : 16;

// Place of (output c, k) in its pair.
template <class T>
__device__ constexpr int64_t in_pair(int64_t c, int64_t k) {
  return sizeof(T) < 4 ? 2 * c + k % 2 : k % 2 * kPanel + c;
}

// Neighbouring panels of one matrix.
template <class T>
struct Panels {
  const T* data;  // [count, pairs, 64]
  int64_t pairs;
  int64_t count;  // panels from here on give 0
};
template <>
struct Panels<Mxfp4> {
  const uint8_t *data, *scales;  // [count, pairs / 16, 512], [count, pairs / 16, 32]
  int64_t pairs;
  int64_t count;
};

// `count` panels from number `index` on; scales are of Mxfp4.
template <class W>
__device__ Panels<W> panels_at(W, const void* packed, const void*, int64_t index, int64_t pairs, int64_t count) {
  return {static_cast<const W*>(packed) + index * pairs * kPair, pairs, count};
}
__device__ inline Panels<Mxfp4> panels_at(Mxfp4, const void* packed, const void* scales, int64_t index, int64_t pairs,
                                          int64_t count) {
  return {static_cast<const uint8_t*>(packed) + index * pairs * kPair / 2,
          static_cast<const uint8_t*>(scales) + index * (pairs / kStepPairs) * kPanel, pairs, count};
}

// A lane's four outputs of a pair: as they come from memory, and as bfloat16.
__device__ inline uint4 load_weights(const BFloat16* four) { return load_streamed(four); }
__device__ inline uint2 load_weights(const Int8* four) { return *reinterpret_cast<const uint2*>(four); }

struct Float8Words {
  uint2 four;
};
__device__ inline Float8Words load_weights(const Float8* four) { return {*reinterpret_cast<const uint2*>(four)}; }

__device__ inline uint4 as_bfloat16(const uint4& four) { return four; }

// 2^23 + 128 + v has the byte v + 128 at its end and nothing above: the difference is v, which fits in 8 bits.
__device__ inline uint32_t exact_bits(uint32_t byte) {
  return std::bit_cast<uint32_t>(std::bit_cast<float>(0x4b000000u | (byte & 0xff) ^ 0x80) - 8388736.0f);
}
__device__ inline uint32_t pair_of_bfloat16(uint32_t bytes) {
  return exact_bits(bytes) >> 16 | (exact_bits(bytes >> 8) & 0xffff0000u);
}
__device__ inline uint4 as_bfloat16(const uint2& four) {
  return uint4{pair_of_bfloat16(four.x), pair_of_bfloat16(four.x >> 16), pair_of_bfloat16(four.y),
               pair_of_bfloat16(four.y >> 16)};
}

// The bits of E4M3 in bfloat16 are the value by 2^-120, denormal where it is denormal, and the product is exact.
__device__ inline uint32_t pair_of_float8(uint32_t bytes) {
  const uint32_t sizes = (bytes & 0x7f) << 4 | (bytes & 0x7f00) << 12;
  const uint32_t signs = (bytes & 0x80) << 8 | (bytes & 0x8000) << 16;
  return multiply_pairs(sizes | signs, 0x7b807b80);
}
__device__ inline uint4 as_bfloat16(const Float8Words& w) {
  return uint4{pair_of_float8(w.four.x), pair_of_float8(w.four.x >> 16), pair_of_float8(w.four.y),
               pair_of_float8(w.four.y >> 16)};
}

// Of Mxfp4, of two words of 8 codes the four pairs of an output: pair i as bfloat16 without its scale by 2^-126, then,
// both exact, without that factor and with the scale.
__device__ inline uint32_t pair_of_codes(uint32_t words, int i, uint32_t scale) {
  const uint32_t codes = words >> (4 * i);
  const uint32_t bits = (codes & 0x00070007) << 6 | (codes & 0x00080008) << 12;
  return multiply_pairs(multiply_pairs(bits, 0x7e807e80), (scale & 0xff) * 0x00800080);
}

// What a lane has of kLoads loads of panels in a step: four outputs of four pairs.
template <class W, int kLoads>
struct LaneWeights {
  decltype(load_weights(static_cast<const W*>(nullptr))) pair[kLoads][4];

  // Where the lane's part of the first step begins.
  __device__ static Panels<W> start(const Panels<W>& weights, int panel, int quad, int group) {
    return {weights.data + (panel * weights.pairs + quad * 4) * kPair + 8 * group, weights.pairs, weights.count};
  }
  __device__ void load(const Panels<W>& lane, int step) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pair[n][i] = load_weights(lane.data + (n * kWarpPanels * lane.pairs + step * int64_t{kStepPairs} + i) * kPair);
  }
  // Zeros for what is not there.
  __device__ void load_some(const Panels<W>& weights, int step, int panel, int quad, int group) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at = n * kWarpPanels + panel, k = step * int64_t{kStepPairs} + quad * 4 + i;
        pair[n][i] = {};
        if (at < weights.count && k < weights.pairs)
          pair[n][i] = load_weights(weights.data + (at * weights.pairs + k) * kPair + 8 * group);
      }
  }
  // Pair i of load n.
  __device__ uint4 operand(int n, int i) const { return as_bfloat16(pair[n][i]); }
};

// A step is a block, and 16 bytes are all that a lane has of it, and 4 the scales.
template <int kLoads>
struct LaneWeights<Mxfp4, kLoads> {
  static constexpr int64_t kBytes = kStepPairs * kPair / 2;
  uint4 codes[kLoads];
  uint32_t scales[kLoads];

  __device__ static Panels<Mxfp4> start(const Panels<Mxfp4>& weights, int panel, int quad, int group) {
    const int64_t steps = panel * (weights.pairs / kStepPairs);
    return {weights.data + steps * kBytes + quad * (kBytes / 4) + 16 * group,
            weights.scales + steps * kPanel + 4 * group, weights.pairs, weights.count};
  }
  __device__ void load(const Panels<Mxfp4>& lane, int step) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int64_t at = n * kWarpPanels * (lane.pairs / kStepPairs) + step;
      codes[n] = load_streamed(lane.data + at * kBytes);
      scales[n] = *reinterpret_cast<const uint32_t*>(lane.scales + at * kPanel);
    }
  }
  __device__ void load_some(const Panels<Mxfp4>& weights, int step, int panel, int quad, int group) {
    const Panels<Mxfp4> lane = start(weights, panel, quad, group);
    const bool is_step = step * int64_t{kStepPairs} < weights.pairs;
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int64_t at = n * kWarpPanels * (lane.pairs / kStepPairs) + step;
      const bool is_there = is_step && n * kWarpPanels + panel < weights.count;
      codes[n] = is_there ? load_streamed(lane.data + at * kBytes) : uint4{0, 0, 0, 0};
      scales[n] = is_there ? *reinterpret_cast<const uint32_t*>(lane.scales + at * kPanel) : 0;
    }
  }
  __device__ uint4 operand(int n, int i) const {
    const uint32_t s = scales[n];
    return uint4{pair_of_codes(codes[n].x, i, s), pair_of_codes(codes[n].y, i, s >> 8),
                 pair_of_codes(codes[n].z, i, s >> 16), pair_of_codes(codes[n].w, i, s >> 24)};
  }
};

// Four outputs from c on for one k of a pair.
__device__ inline float4 load_outputs(const float* pair, int c, int64_t k) {
  return *reinterpret_cast<const float4*>(pair + in_pair<float>(c, k));
}
template <class W>
__device__ float4 load_outputs(const W* pair, int c, int64_t k) {
  const W* first = pair + in_pair<W>(c, k);
  return float4{to_float(first[0]), to_float(first[2]), to_float(first[4]), to_float(first[6])};
}

// The same for k of panel `at`.
template <class W>
__device__ float4 outputs_of(const Panels<W>& weights, int64_t at, int c, int64_t k) {
  return load_outputs(weights.data + (at * weights.pairs + k / 2) * kPair, c, k);
}
__device__ inline float4 outputs_of(const Panels<Mxfp4>& weights, int64_t at, int c, int64_t k) {
  const auto* words = reinterpret_cast<const uint16_t*>(weights.data + at * weights.pairs * kPair / 2);
  const uint16_t* own = words + k / 8 * kPair + 2 * c + k % 2;
  const uint8_t* scales = weights.scales + (at * (weights.pairs / kStepPairs) + k / kMxBlock) * kPanel + c;
  const auto value = [&](int i) { return to_float(mx_product(own[2 * i] >> (k / 2 % 4 * 4) & 15, scales[i])); };
  return float4{value(0), value(1), value(2), value(3)};
}

// Values k .. k + 7 of a row; zeros from K on, and where there is no row. `aligned`: rows start at 16 bytes.
__device__ inline uint4 load_eight(const BFloat16* row, int64_t k, int64_t K, bool aligned) {
  if (!row || k >= K) return uint4{0, 0, 0, 0};
  if (aligned && k + 8 <= K) return *reinterpret_cast<const uint4*>(row + k);
  uint64_t low = 0, high = 0;
#pragma unroll 1  // unrolled, this rare case made the registers of every kernel spill
  for (int64_t i = (k + 8 <= K ? k + 8 : K) - 1; i >= k; --i) {
    high = high << 16 | low >> 48;
    low = low << 16 | row[i].bits;
  }
  return uint4{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
               static_cast<uint32_t>(high >> 32)};
}

template <class T>
__device__ bool is_aligned(const T* rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

// Real models have whole steps only, and then no load has anything to ask, which leaves registers for kStages.
template <class T>
__device__ bool is_whole(const Panels<T>& weights, int panels, int64_t K, bool aligned) {
  return aligned && K % (2 * kStepPairs) == 0 && weights.count >= panels;
}

// Sums of a warp, kPanels panels by kRows rows:
//   add(weights, row, K, aligned, first, stride)
//                         steps first, first + stride, ...; row(i): row i of x, or nullptr
//   add<is_whole(..)>     the same where the kernel knows: with a loop around it the choice in here spilled
//   each(f, begin, end)   f(i, c, four): row i, outputs c .. c + 3, each once in the warp, of the rows [begin, end),
//                         whole tiles
// and for kernels that have their own loads or go on with the sums where they are:
//   visit(f)              f(r, c, x0, x1, x2, x3): the sums themselves, of row(r) of the lane's kLaneRows rows and of
//                         outputs c .. c + 3
//   over_outputs(x, f)    f of the x of all lanes that have sums of the same rows; is_first is one of them
// T: of x, and of the weights unless W says otherwise.
template <class T, int kPanels, int kRows, class W = T>
struct PanelSums;

template <int kPanels, int kRows, class W>
struct PanelSums<BFloat16, kPanels, kRows, W> {
  static_assert(kPanels % kWarpPanels == 0 && kRows % kTileRows == 0);
  static constexpr int kLoads = kPanels / kWarpPanels, kTiles = kRows / kTileRows;
  static constexpr int kInstructions = kWarpSize == 32 ? 2 : 4;  // for the four outputs of a load
  // Steps on their way while one is multiplied, as many as leave two blocks of 256 threads an SM for up to 16 rows:
  // these have 96 KB or more in flight, of which 32 KB hide the latency of an H200's memory. That matters where blocks
  // are few: one row touches one expert.
  static constexpr int kStages = (kTiles > 2 || kLoads > 1 ? 2
                                  : kTiles > 1             ? 3
                                                           : 4) *
                                 (sizeof(LaneWeights<W, 1>) < 32 ? 2 : 1);

  using Weights = LaneWeights<W, kLoads>;

  float sums[kLoads][kTiles][kInstructions][4] = {};

  template <class Row>
  __device__ void add(const Panels<W>& weights, Row row, int64_t K, bool aligned, int first, int stride) {
    if (is_whole(weights, kPanels, K, aligned))
      add<true>(weights, row, K, aligned, first, stride);
    else
      add<false>(weights, row, K, aligned, first, stride);
  }

  template <bool kWhole, class Row>
  __device__ void add(const Panels<W>& weights, Row row, int64_t K, bool aligned, int first, int stride) {
    const BFloat16* rows[kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) rows[j] = row(j * kTileRows + row_of_lane());
    const int steps = static_cast<int>((weights.pairs + kStepPairs - 1) / kStepPairs);
    if constexpr (kWhole)
      add_whole(weights, rows, steps, first, stride);
    else
      add_any(weights, rows, K, aligned, steps, first, stride);
  }

  // Where the tiles are parts of the same rows, the first one the largest: their sums, in the first tile.
  __device__ void join_tiles() {
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
#pragma unroll
      for (int j = kTiles - 1; j > 0; --j)
#pragma unroll
        for (int i = 0; i < 4 * kInstructions; ++i) sums[n][j - 1][i / 4][i % 4] += sums[n][j][i / 4][i % 4];
  }

  template <class F>
  __device__ void each(F f, int begin = 0, int end = kRows) const {
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j * kTileRows < begin || j * kTileRows >= end) continue;
        const auto& s = sums[n][j];
#pragma unroll
        for (int i = 0; i < kWarpSize / 16; ++i) {
          if constexpr (kWarpSize == 32) {
            f(j * kTileRows + 2 * quad() + i, n * kPanel + 4 * group(),
              float4{s[0][i], s[0][2 + i], s[1][i], s[1][2 + i]});
          } else {
            const int place = 4 * quad() + i;
            f(j * kTileRows + row_of_lane(), (2 * n + place / 8) * kPanel + 4 * (place % 8),
              float4{s[0][i], s[1][i], s[2][i], s[3][i]});
          }
        }
      }
  }

  static constexpr int kLaneRows = kWarpSize == 32 ? 2 * kTiles : kTiles;
  __device__ static int row(int r) {
    return kWarpSize == 32 ? r / 2 * kTileRows + 2 * quad() + r % 2 : r * kTileRows + row_of_lane();
  }

  template <class F>
  __device__ void visit(F f) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        auto& s = sums[n][j];
#pragma unroll
        for (int i = 0; i < kWarpSize / 16; ++i) {
          if constexpr (kWarpSize == 32) {
            f(2 * j + i, n * kPanel + 4 * group(), s[0][i], s[0][2 + i], s[1][i], s[1][2 + i]);
          } else {
            const int place = 4 * quad() + i;
            f(j, (2 * n + place / 8) * kPanel + 4 * (place % 8), s[0][i], s[1][i], s[2][i], s[3][i]);
          }
        }
      }
  }

  template <class Combine>
  __device__ static float over_outputs(float x, Combine combine) {
    for (int mask = kWarpSize == 32 ? 4 : 16; mask < kWarpSize; mask *= 2) x = combine(x, shuffle_xor(x, mask));
    return x;
  }
  __device__ static bool is_first() { return kWarpSize == 32 ? group() == 0 : quad() == 0; }

  // A lane's part of a load, and of a row of x.
  __device__ static int lane() { return threadIdx.x % kWarpSize; }
  __device__ static int group() { return kWarpSize == 32 ? lane() / 4 : lane() % 8; }
  __device__ static int quad() { return kWarpSize == 32 ? lane() % 4 : lane() / 16; }
  __device__ static int panel() { return kWarpSize == 32 ? 0 : lane() % 16 / 8; }
  __device__ static int row_of_lane() { return kWarpSize == 32 ? lane() / 4 : lane() % 16; }

  __device__ static int64_t first_k(int step) { return 2 * (step * int64_t{kStepPairs} + quad() * 4); }

  __device__ void add_whole(const Panels<W>& weights, const BFloat16* const (&rows)[kTiles], int steps, int first,
                            int stride) {
    const Panels<W> lane = Weights::start(weights, panel(), quad(), group());
    Weights stages[kStages];
#pragma unroll
    for (int i = 0; i < kStages; ++i)
      if (first + i * stride < steps) stages[i].load(lane, first + i * stride);
#pragma unroll 1
    for (int step = first; step < steps; step += kStages * stride)
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        const int now = step + i * stride, then = now + kStages * stride;
        if (now >= steps) return;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          multiply(stages[i], rows[j] ? *reinterpret_cast<const uint4*>(rows[j] + first_k(now)) : uint4{0, 0, 0, 0}, j);
        if (then < steps) stages[i].load(lane, then);
      }
  }

  __device__ void add_any(const Panels<W>& weights, const BFloat16* const (&rows)[kTiles], int64_t K, bool aligned,
                          int steps, int first, int stride) {
    Weights next;
    next.load_some(weights, first, panel(), quad(), group());
#pragma unroll 1
    for (int step = first; step < steps; step += stride) {
      const Weights now = next;
      next.load_some(weights, step + stride, panel(), quad(), group());
#pragma unroll
      for (int j = 0; j < kTiles; ++j) multiply(now, load_eight(rows[j], first_k(step), K, aligned), j);
    }
  }

  // Rows of tile j; x: 16 bytes of row j * kTileRows + row_of_lane().
  __device__ void multiply(const Weights& w, const uint4& x, int j) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      multiply(w.operand(n, 0), w.operand(n, 1), x.x, x.y, n, j);
      multiply(w.operand(n, 2), w.operand(n, 3), x.z, x.w, n, j);
    }
  }
  // Pairs p and q of load n; of 16 bytes of x the first or the last 8.
  __device__ void multiply(uint4 p, uint4 q, uint32_t x0, uint32_t x1, int n, int j) {
    auto& s = sums[n][j];
    if constexpr (kWarpSize == 32) {
      mma(s[0], MmaM16N8K16{{p.x, p.y, q.x, q.y}, {x0, x1}});
      mma(s[1], MmaM16N8K16{{p.z, p.w, q.z, q.w}, {x0, x1}});
    } else {
      mma(s[0], MmaM16N16K16{{p.x, q.x}, {x0, x1}});
      mma(s[1], MmaM16N16K16{{p.y, q.y}, {x0, x1}});
      mma(s[2], MmaM16N16K16{{p.z, q.z}, {x0, x1}});
      mma(s[3], MmaM16N16K16{{p.w, q.w}, {x0, x1}});
    }
  }
};

// float32 is for tests and small models: plain multiply-adds.
template <int kPanels, int kRows, class W>
struct PanelSums<float, kPanels, kRows, W> {
  static_assert(kPanels % kWarpPanels == 0 && kRows % 4 == 0);
  static constexpr int kLoads = kPanels / kWarpPanels, kTiles = kRows / 4;

  float4 sums[kLoads][kTiles] = {};

  template <class Row>
  __device__ void add(const Panels<W>& weights, Row row, int64_t K, bool aligned, int first, int stride) {
    add<false>(weights, row, K, aligned, first, stride);
  }

  template <bool, class Row>
  __device__ void add(const Panels<W>& weights, Row row, int64_t K, bool, int first, int stride) {
    const float* rows[kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) rows[j] = row(4 * j + row_of_lane());
    for (int64_t step = first; step * kStepPairs < weights.pairs; step += stride)
      for (int64_t k = step * kStepPairs * 2; k < K && k < (step + 1) * kStepPairs * 2; ++k)
        for (int n = 0; n < kLoads; ++n) {
          const int64_t at = n * kWarpPanels + panel();
          if (at >= weights.count) continue;
          const float4 w = outputs_of(weights, at, 4 * group(), k);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) add_scaled(sums[n][j], w, rows[j] ? rows[j][k] : 0);
        }
  }

  template <class F>
  __device__ void each(F f, int begin = 0, int end = kRows) const {
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (4 * j >= begin && 4 * j < end)
          f(4 * j + row_of_lane(), (n * kWarpPanels + panel()) * kPanel + 4 * group(), sums[n][j]);
  }

  struct Weights {};  // no loads ahead

  static constexpr int kLaneRows = kTiles;
  __device__ static int row(int r) { return 4 * r + row_of_lane(); }

  // x(row): the value of a row that meets w, the lane's four outputs of load n.
  template <class X>
  __device__ void multiply(const float4& w, int n, X x) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) add_scaled(sums[n][j], w, x(4 * j + row_of_lane()));
  }

  template <class F>
  __device__ void visit(F f) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float4& s = sums[n][j];
        f(j, (n * kWarpPanels + panel()) * kPanel + 4 * group(), s.x, s.y, s.z, s.w);
      }
  }

  template <class Combine>
  __device__ static float over_outputs(float x, Combine combine) {
    for (int mask = 1; mask < kWarpSize; mask *= 2)
      if (mask < 8 || mask >= 32) x = combine(x, shuffle_xor(x, mask));
    return x;
  }
  __device__ static bool is_first() { return group() == 0 && panel() == 0; }

  __device__ static int lane() { return threadIdx.x % kWarpSize; }
  __device__ static int group() { return lane() % 8; }
  __device__ static int row_of_lane() { return lane() / 8 % 4; }
  __device__ static int panel() { return lane() / 32; }
  __device__ static void add_scaled(float4& sum, const float4& w, float x) {
    sum = float4{fmaf(w.x, x, sum.x), fmaf(w.y, x, sum.y), fmaf(w.z, x, sum.z), fmaf(w.w, x, sum.w)};
  }
};

// The sums of all warps of a block, which take turns at the steps, kPart rows after the others where shared memory
// cannot hold those of all rows. Shared: float [kWarps][kPart][32 kPanels].
template <class T, int kPanels, int kRows, int kWarps, int kPart = kRows, class W = T>
struct BlockProduct {
  static constexpr int kOutputs = kPanels * kPanel;
  static constexpr int kFloats = kWarps * kPart * kOutputs;

  float* shared;  // kFloats, at 16 bytes

  // part(first): sum(i, c) is that of row first + i. All threads of the block; the barrier before the next use of
  // `shared` is the caller's.
  // For a kernel that knows whether the product is_whole: around a loop over products, the choice inside it spilled.
  template <bool kWhole, class Row, class Part>
  __device__ void multiply(const Panels<W>& weights, Row row, int64_t K, bool aligned, Part part) const {
    static_assert(kRows % kPart == 0);
    const int warp = threadIdx.x / kWarpSize;
    PanelSums<T, kPanels, kRows, W> sums;
    sums.template add<kWhole>(weights, row, K, aligned, warp, kWarps);
    float* own = shared + warp * kPart * kOutputs;
#pragma unroll
    for (int first = 0; first < kRows; first += kPart) {
      if (first > 0) __syncthreads();
      sums.each([&](int i, int c,
                    const float4& four) { *reinterpret_cast<float4*>(own + (i - first) * kOutputs + c) = four; },
                first, first + kPart);
      __syncthreads();
      part(first);
    }
  }

  template <class Row, class Part>
  __device__ void multiply(const Panels<W>& weights, Row row, int64_t K, bool aligned, Part part) const {
    if (is_whole(weights, kPanels, K, aligned))
      multiply<true>(weights, row, K, aligned, part);
    else
      multiply<false>(weights, row, K, aligned, part);
  }

  template <class Row>
  __device__ void multiply(const Panels<W>& weights, Row row, int64_t K, bool aligned) const {
    static_assert(kPart == kRows, "sum() would know the last rows only");
    multiply(weights, row, K, aligned, [](int) {});
  }

  __device__ float sum(int i, int c) const {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += shared[(warp * kPart + i) * kOutputs + c];
    return total;
  }
};

}  // namespace blockdraft::gpu
