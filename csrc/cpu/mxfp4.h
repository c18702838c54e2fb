#pragma once
// Panels of Mxfp4 weights (ops/pack_weight.h) in the products of gemm.h: four pairs are 64 words of 16 bits, two for an
// output, even k and odd k, with a code of each pair from the low bits up; 16 pairs are a block, whose 32 outputs have
// a scale each.
//
// A code times its scale is a bfloat16, exactly, and meets x as a bfloat16 weight would: the bits are those of such
// weights. Few rows take their weights in registers; for others a part of the panel becomes bfloat16 in the L1 cache.
#include "cpu/gemm.h"

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace blockdraft::cpu {

constexpr int64_t kMxPairs = kMxBlock / 2;

struct MxPanel {
  const uint8_t *codes, *scales;  // [pairs / 16, 512], [pairs / 16, 32]
};

// What lies `pairs` pairs further, in whole blocks.
BLOCKDRAFT_INLINE MxPanel mx_panel(const void* codes, const void* scales, int64_t pairs) {
  return {static_cast<const uint8_t*>(codes) + pairs * kPair / 2,
          static_cast<const uint8_t*>(scales) + pairs / kMxPairs * kPanel};
}
BLOCKDRAFT_INLINE MxPanel operator+(MxPanel panel, int64_t pairs) { return mx_panel(panel.codes, panel.scales, pairs); }

typedef uint16_t NativeHalves __attribute__((vector_size(4 * kNativeLanes)));

#ifdef __AVX512BW__
// By code: its product with the largest scale. A smaller scale takes off the difference of the exponents, without going
// below 0, so that 0, here without sign, stays what it is. A lookup takes 5 bits: the table stands there twice.
struct MxTable {
  alignas(64) uint16_t bits[32];
  constexpr MxTable() : bits() {
    for (uint32_t i = 0; i < 32; ++i) bits[i] = i & 7 ? mx_product(i & 15, kLargestMxScale).bits : 0;
  }
};
constexpr MxTable kMxTable;

// From scales of the outputs of a register, for values_of.
BLOCKDRAFT_INLINE NativeHalves load_mx_scales(const uint8_t* scales) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  const __m512i steps = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(kLargestMxScale), wide), 7);
  return bits_as<NativeHalves>(_mm512_or_si512(steps, _mm512_slli_epi32(steps, 16)));
}

// bfloat16 of the codes in the low bits of words.
BLOCKDRAFT_INLINE NativeHalves values_of(NativeHalves words, NativeHalves scales) {
  const __m512i most = _mm512_permutexvar_epi16(bits_as<__m512i>(words), _mm512_load_si512(kMxTable.bits));
  return bits_as<NativeHalves>(_mm512_subs_epu16(most, bits_as<__m512i>(scales)));
}
#else
// The bits of half a scale: sizes count on from there, but for 0 and the half itself.
BLOCKDRAFT_INLINE NativeHalves load_mx_scales(const uint8_t* scales) {
  typedef uint8_t Bytes __attribute__((vector_size(kNativeLanes)));
  const NativeWords words = __builtin_convertvector(load_native<Bytes>(scales), NativeWords);
  return bits_as<NativeHalves>((words | words << 16) - 0x10001u) << 7;
}

BLOCKDRAFT_INLINE NativeHalves values_of(NativeHalves words, NativeHalves scales) {
  const NativeHalves size = words & 7, sign = (words & 8) << 12;
  const NativeHalves half = bits_as<NativeHalves>(size == 1), some = bits_as<NativeHalves>(size != 0);
  return ((scales + (size << 6) - (half & 64)) & some) | sign;
}
#endif

// Whole blocks of a panel to bfloat16 [pairs][32][2].
static inline void widen_panel(MxPanel panel, int64_t pairs, BFloat16* out) {
  for (int64_t k = 0; k < pairs; k += kMxPairs, panel = panel + kMxPairs)
    for (int64_t c = 0; c < kPanel; c += kNativeLanes) {
      const NativeHalves scales = load_mx_scales(panel.scales + c);
      for (int64_t i = 0; i < kMxPairs; i += 4) {
        const uint8_t* words = panel.codes + i * kPair / 2 + 4 * c;
        __builtin_prefetch(words + kBlockPairs * kPair / 2);
        const NativeHalves four = load_native<NativeHalves>(words);
        for (int64_t n = 0; n < 4; ++n) {
          const NativeHalves values = values_of(four >> (4 * n), scales);
          __builtin_memcpy(out + (k + i + n) * kPair + 2 * c, &values, sizeof values);
        }
      }
    }
}

#ifdef __AVX512BF16__
constexpr int64_t register_rows(const BFloat16* x) { return tile_rows(x); }

// All of one or two panels for at most 8 or 4 rows.
template <int kRows, int kPanels, class Out>
static inline void multiply_in_registers(const BFloat16* x, int64_t stride, MxPanel panel, int64_t pairs, Out out) {
  Vec sum[kRows][2 * kPanels] = {};
  for (int64_t k = 0; k < pairs; k += kMxPairs) {
    MxPanel part[kPanels];
    NativeHalves scales[2 * kPanels];
    for (int j = 0; j < kPanels; ++j) part[j] = panel + (j * pairs + k);
    for (int j = 0; j < 2 * kPanels; ++j) scales[j] = load_mx_scales(part[j / 2].scales + j % 2 * kLanes);
    for (int64_t i = 0; i < kMxPairs; i += 4) {
      NativeHalves four[2 * kPanels];
      for (int j = 0; j < 2 * kPanels; ++j)
        four[j] = load_native<NativeHalves>(part[j / 2].codes + i * kPair / 2 + j % 2 * 64);
#pragma GCC unroll 4
      for (int64_t n = 0; n < 4; ++n) {
        __m512bh w[2 * kPanels];
        for (int j = 0; j < 2 * kPanels; ++j) w[j] = bits_as<__m512bh>(values_of(four[j] >> (4 * n), scales[j]));
        for (int r = 0; r < kRows; ++r) {
          uint32_t pair;
          __builtin_memcpy(&pair, x + r * stride + 2 * (k + i + n), sizeof pair);
          const __m512bh both = bits_as<__m512bh>(pair - WordVec{});
          for (int j = 0; j < 2 * kPanels; ++j)
            sum[r][j] = bits_as<Vec>(_mm512_dpbf16_ps(bits_as<__m512>(sum[r][j]), w[j], both));
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) out(r, sum[r]);
}

template <int kMost, int kPanels, class Out>
BLOCKDRAFT_INLINE void choose_in_registers(int64_t rows, const BFloat16* x, int64_t stride, MxPanel panel,
                                           int64_t pairs, Out out) {
  if constexpr (kMost > 0) {
    if (rows == kMost) return multiply_in_registers<kMost, kPanels>(x, stride, panel, pairs, out);
    choose_in_registers<kMost - 1, kPanels>(rows, x, stride, panel, pairs, out);
  }
}
#endif
constexpr int64_t register_rows(const float*) { return 0; }

// As multiply_panel of other weights.
template <class X, class Out>
static inline void multiply_panel(const X* x, int64_t stride, int64_t rows, MxPanel panel, int64_t pairs, Out out) {
  constexpr int64_t kFewRows = register_rows(static_cast<const X*>(nullptr));
  constexpr int64_t kSums = row_sums(static_cast<const X*>(nullptr));
  if constexpr (kFewRows > 0)
    if (rows <= kFewRows) return choose_in_registers<kFewRows, 1>(rows, x, stride, panel, pairs, out);
  alignas(64) float sums[kBlockRows * kSums];
  alignas(64) BFloat16 part[kBlockPairs * kPair];
  for (int64_t first = 0; first < rows; first += kBlockRows) {
    const int64_t count = minimum(rows - first, kBlockRows);
    __builtin_memset(sums, 0, count * kSums * sizeof(float));
    for (int64_t k = 0; k < pairs; k += kBlockPairs) {
      const int64_t n = minimum(pairs - k, kBlockPairs);
      widen_panel(panel + k, n, part);
      accumulate_block<false>(x + first * stride + 2 * k, stride, count, part, n, sums);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Vec total[2] = {total_of(x, sums + i * kSums, 0), total_of(x, sums + i * kSums, 1)};
      out(first + i, total);
    }
  }
}

// As multiply_two_panels of other weights; the second panel lies after the first.
template <class X, class Out>
static inline void multiply_two_panels(const X* x, int64_t stride, int64_t rows, MxPanel panel, int64_t pairs,
                                       Out out) {
  constexpr int64_t kFewRows = few_rows(static_cast<const X*>(nullptr));
  if constexpr (kFewRows > 0)
    if (rows <= kFewRows) return choose_in_registers<kFewRows, 2>(rows, x, stride, panel, pairs, out);
  multiply_in_turn(x, stride, rows, panel, panel + pairs, pairs, out);
}

}  // namespace blockdraft::cpu
