#pragma once
// The matrix product under every CPU kernel: rows of float32 against a packed panel of 32 outputs.
//
// A panel holds 32 rows of a weight matrix [N, K], two neighbouring k at a time (panel.h); K is padded to even.
//
// Bits: each output is one chain of fused multiply-adds over even k, one over odd k, and their sum. Neither the number
// of rows nor the blocking below enters, so a row has the same bits in any company.
#include "cpu/panel.h"

namespace blockdraft::cpu {

#if defined(__AVX512F__)
constexpr int kTileRows = 6;  // 6 rows x 2 vectors x even and odd: 24 of 32 registers
#else
constexpr int kTileRows = 2;  // 16 registers of 8 lanes hold one row and a half; 1 and 4 were slower
#endif
constexpr int64_t kBlockRows = 48;    // rows whose sums are kept while a part of the panel is in the L1 cache
constexpr int64_t kBlockPairs = 128;  // 16 KB of bfloat16 panel: a third of the L1 cache

struct PairOf {
  Vec even[2], odd[2];  // 32 outputs each
};

BLOCKDRAFT_INLINE PairOf load_pair(const BFloat16* panel) {
  const WordVec low = load_words(panel), high = load_words(panel + kPanel);
  return {{bits_as<Vec>(low << 16), bits_as<Vec>(high << 16)},
          {bits_as<Vec>(low & 0xffff0000u), bits_as<Vec>(high & 0xffff0000u)}};
}

BLOCKDRAFT_INLINE PairOf load_pair(const float* panel) {
  return {{load(panel), load(panel + kLanes)}, {load(panel + kPanel), load(panel + kPanel + kLanes)}};
}

// sums [kRows][64] (even outputs, then odd ones) += x [kRows, 2 * pairs] panel.
template <int kRows, class W>
static inline void multiply_tile(const float* x, int64_t stride, const W* panel, int64_t pairs, float* sums) {
  Vec even[kRows][2], odd[kRows][2];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 2; ++j) {
      even[i][j] = load(sums + i * kPair + j * kLanes);
      odd[i][j] = load(sums + i * kPair + kPanel + j * kLanes);
    }
  for (int64_t k = 0; k < pairs; ++k, panel += kPair) {
    const PairOf w = load_pair(panel);
    for (int i = 0; i < kRows; ++i) {
      const float x0 = x[i * stride + 2 * k], x1 = x[i * stride + 2 * k + 1];
      for (int j = 0; j < 2; ++j) {
        even[i][j] += w.even[j] * x0;
        odd[i][j] += w.odd[j] * x1;
      }
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 2; ++j) {
      store(sums + i * kPair + j * kLanes, even[i][j]);
      store(sums + i * kPair + kPanel + j * kLanes, odd[i][j]);
    }
}

template <class W>
BLOCKDRAFT_INLINE void multiply_rest(int rows, const float* x, int64_t stride, const W* panel, int64_t pairs,
                                     float* sums) {
  static_assert(kTileRows <= 6);
  if (rows == 1) multiply_tile<1>(x, stride, panel, pairs, sums);
  if constexpr (kTileRows > 2) {
    if (rows == 2) multiply_tile<2>(x, stride, panel, pairs, sums);
    if (rows == 3) multiply_tile<3>(x, stride, panel, pairs, sums);
    if (rows == 4) multiply_tile<4>(x, stride, panel, pairs, sums);
    if (rows == 5) multiply_tile<5>(x, stride, panel, pairs, sums);
  }
}

// out(row, sums of 32 outputs) for every row of x [rows, 2 * pairs], whose rows are `stride` floats apart.
template <class W, class Out>
static inline void multiply_panel(const float* x, int64_t stride, int64_t rows, const W* panel, int64_t pairs,
                                  Out out) {
  alignas(64) float sums[kBlockRows * kPair];
  for (int64_t first = 0; first < rows; first += kBlockRows) {
    const int64_t count = minimum(rows - first, kBlockRows);
    __builtin_memset(sums, 0, count * kPair * sizeof(float));
    const int64_t step = count <= kTileRows ? pairs : kBlockPairs;
    for (int64_t k = 0; k < pairs; k += step) {
      const float* x_block = x + first * stride + 2 * k;
      const W* part = panel + k * kPair;
      const int64_t length = minimum(pairs - k, step);
      int64_t i = 0;
      for (; i + kTileRows <= count; i += kTileRows)
        multiply_tile<kTileRows>(x_block + i * stride, stride, part, length, sums + i * kPair);
      multiply_rest(static_cast<int>(count - i), x_block + i * stride, stride, part, length, sums + i * kPair);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* s = sums + i * kPair;
      Vec total[2] = {load(s) + load(s + kPanel), load(s + kLanes) + load(s + kPanel + kLanes)};
      out(first + i, total);
    }
  }
}

// The first n of 32 outputs to out, in the storage type.
template <class T>
BLOCKDRAFT_INLINE void store_panel(T* out, const Vec (&total)[2], int64_t n) {
  for (int64_t c = 0; c < minimum(n, kPanel); ++c) narrow(total[c / kLanes][c % kLanes], out + c);
}

// rows of T to float32 rows of `stride` >= K floats; what lies between K and stride becomes 0.
template <class T>
BLOCKDRAFT_INLINE void widen_row(const T* x, int64_t K, float* out, int64_t stride) {
  for (int64_t k = 0; k < K; ++k) out[k] = widen(x[k]);
  for (int64_t k = K; k < stride; ++k) out[k] = 0;
}

}  // namespace blockdraft::cpu
