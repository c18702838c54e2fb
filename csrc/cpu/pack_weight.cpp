#include "ops/pack_weight.h"

#include "cpu/panel.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

// A panel is the transpose of 32 rows of words of 4 bytes: pairs of bfloat16, or single float32. Words of int8 are two
// pairs, which lie one behind the other for all 32 outputs.
constexpr int64_t kWordBytes = 4;

// Where the lane `l` of a row of a transpose comes from, in two rows `step` apart: 0 to 15 the upper, from 16 the
// lower.
template <int step>
constexpr int upper(int l) {
  return l & step ? 16 + l - step : l;
}
template <int step>
constexpr int lower(int l) {
  return l & step ? 16 + l : l + step;
}
#define BLOCKDRAFT_LANES(f) \
  f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)

// Exchanges the off-diagonal blocks of step x step.
template <int step>
BLOCKDRAFT_INLINE void exchange(WordVec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & step) continue;
    const WordVec a = rows[i], b = rows[i + step];
    rows[i] = __builtin_shufflevector(a, b, BLOCKDRAFT_LANES(upper<step>));
    rows[i + step] = __builtin_shufflevector(a, b, BLOCKDRAFT_LANES(lower<step>));
  }
}
#undef BLOCKDRAFT_LANES

// Row i of words [16][32], 16 of them.
BLOCKDRAFT_INLINE void store_row(WordVec row, int64_t i, float* packed) {
  __builtin_memcpy(packed + i * kPanel, &row, sizeof row);
}
BLOCKDRAFT_INLINE void store_row(WordVec row, int64_t i, BFloat16* packed) {
  __builtin_memcpy(packed + i * kPair, &row, sizeof row);
}
BLOCKDRAFT_INLINE void store_row(WordVec row, int64_t i, Int8* packed) {
  const HalfVec pairs[2] = {__builtin_convertvector(row & 0xffffu, HalfVec),
                            __builtin_convertvector(row >> 16, HalfVec)};
  for (int j = 0; j < 2; ++j) __builtin_memcpy(packed + (2 * i + j) * kPair, &pairs[j], sizeof pairs[j]);
}

// Even k of a word of 8 codes to its lower half, odd k to the upper one.
BLOCKDRAFT_INLINE uint32_t part_codes(uint32_t codes) {
  const auto gather = [](uint32_t x) {
    x = (x | x >> 4) & 0x00ff00ff;
    return (x | x >> 8) & 0xffff;
  };
  return gather(codes & 0x0f0f0f0f) | gather(codes >> 4 & 0x0f0f0f0f) << 16;
}
BLOCKDRAFT_INLINE void store_row(WordVec row, int64_t i, Mxfp4* packed) {
  for (int l = 0; l < kLanes; ++l) row[l] = part_codes(row[l]);
  __builtin_memcpy(packed + i * kPanel * kWordBytes, &row, sizeof row);
}

// Words [16][16] of rows `stride` bytes apart, to [16][32].
template <class T>
BLOCKDRAFT_INLINE void transpose_tile(const char* rows, int64_t stride, T* packed) {
  WordVec tile[kLanes];
  for (int i = 0; i < kLanes; ++i) tile[i] = load_words(rows + i * stride);
  exchange<1>(tile);
  exchange<2>(tile);
  exchange<4>(tile);
  exchange<8>(tile);
  for (int i = 0; i < kLanes; ++i) store_row(tile[i], i, packed);
}

// Columns from k on, and what the matrix does not have.
template <class T>
void pack_rest(const T* weight, int64_t K, int64_t rows, int64_t k, int64_t pairs, T* packed) {
  for (; k < 2 * pairs; ++k)
    for (int64_t c = 0; c < kPanel; ++c)
      packed[k / 2 * kPair + in_pair<T>(c, k)] = c < rows && k < K ? weight[c * K + k] : T{};
}

template <class T>
void pack_panel(const PackWeightParams& p, int64_t matrix, int64_t panel) {
  constexpr int64_t kTile = kLanes * kWordBytes / sizeof(T);  // columns of a tile
  const int64_t half_rows = p.N / p.halves, half = panel % p.halves;
  const int64_t first = panel / p.halves * kPanel;
  const T* weight = static_cast<const T*>(p.weight) + (matrix * p.N + half * half_rows + first) * p.K;
  T* packed = static_cast<T*>(p.packed) + (matrix * p.panels + panel) * p.pairs * kPair;
  const int64_t rows = minimum(kPanel, half_rows - first), whole = rows == kPanel ? p.K / kTile * kTile : 0;
  const int64_t stride = p.K * sizeof(T);
  for (int64_t k = 0; k < whole; k += kTile)
    for (int64_t c = 0; c < kPanel; c += kLanes)
      transpose_tile(reinterpret_cast<const char*>(weight + c * p.K + k), stride,
                     packed + k / 2 * kPair + in_pair<T>(c, 0));
  pack_rest(weight, p.K, rows, whole, p.pairs, packed);
}

// A word is 8 k of a row.
void pack_mx_panel(const PackWeightParams& p, int64_t matrix, int64_t panel) {
  const int64_t half_rows = p.N / p.halves, first = panel / p.halves * kPanel, stride = p.K / 2;
  const char* weight =
      static_cast<const char*>(p.weight) + (matrix * p.N + panel % p.halves * half_rows + first) * stride;
  Mxfp4* packed = static_cast<Mxfp4*>(p.packed) + (matrix * p.panels + panel) * p.pairs * kPair / 2;
  const int64_t rows = minimum(kPanel, half_rows - first), words = stride / kWordBytes;
  const int64_t whole = rows == kPanel ? words / kLanes * kLanes : 0;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t c = 0; c < kPanel; c += kLanes)
      transpose_tile(weight + c * stride + i * kWordBytes, stride, packed + (i * kPanel + c) * kWordBytes);
  for (int64_t i = whole; i < words; ++i)
    for (int64_t c = 0; c < kPanel; ++c) {
      uint32_t codes = 0;
      if (c < rows) __builtin_memcpy(&codes, weight + c * stride + i * kWordBytes, sizeof codes);
      codes = part_codes(codes);
      __builtin_memcpy(packed + (i * kPanel + c) * kWordBytes, &codes, sizeof codes);
    }
}

}  // namespace

void pack_weight(const PackWeightParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.dtype == DType::kBFloat16)
      pack_panel<BFloat16>(p, i / p.panels, i % p.panels);
    else if (p.dtype == DType::kInt8 || p.dtype == DType::kFloat8)
      pack_panel<Int8>(p, i / p.panels, i % p.panels);
    else if (p.dtype == DType::kMxfp4)
      pack_mx_panel(p, i / p.panels, i % p.panels);
    else
      pack_panel<float>(p, i / p.panels, i % p.panels);
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
