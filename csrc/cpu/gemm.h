#pragma once
// The matrix product under every CPU kernel: rows against a packed panel of 32 outputs.
//
// A panel holds 32 rows of a weight matrix [N, K], two neighbouring k at a time (panel.h); K is padded to even.
//
// Weights of one byte become float32 or bfloat16, which hold them exactly, in registers; the caller scales the sums.
//
// Bits: each output is one chain of fused multiply-adds over even k, one over odd k, and their sum; where a bfloat16
// instruction takes pairs, one chain over pairs. Neither the number of rows nor the blocking below enters, so a row has
// the same bits in any company.
#include "cpu/panel.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace blockdraft::cpu {

// What rows of T are when they meet weights: float32, or bfloat16 where pairs are multiplied (cpu_isa.h).
template <class T>
struct RowType {
  using Type = float;
};
#ifdef __AVX512BF16__
template <>
struct RowType<BFloat16> {
  using Type = BFloat16;
};
#endif
template <class T>
using RowOf = typename RowType<T>::Type;

constexpr int64_t kBlockRows = 48;    // rows whose sums are kept while a part of the panel is in the L1 cache
constexpr int64_t kBlockPairs = 128;  // 16 KB of bfloat16 panel: a third of the L1 cache

// Asks for the pair that lies a block further: the first rows of a block fetch the next block for all. 16 rows of
// bfloat16 over cold weights ran at 25 GB/s without, 36 with it, 1 row at 43.
template <bool kFirst, class W>
BLOCKDRAFT_INLINE void prefetch_next(const W* panel) {
  if constexpr (kFirst)
    for (int64_t i = 0; i < kPair; i += 64 / sizeof(W)) __builtin_prefetch(panel + kBlockPairs * kPair + i);
}

// float32 rows. Sums of a row: 32 of even k, 32 of odd k.

// Vectors of one register: the compiler keeps wider ones in memory, where each sum waited for the store of the one
// before it: 3 GFLOP/s with AVX2, and 4 without. Two of them for each of even and odd k, a strip of the panel's
// outputs, go through a block before the next strip does.
#if defined(__AVX512F__)
constexpr int kNativeLanes = 16, kFloatRows = 6;  // 6 rows x 4 sums: 24 of 32 registers
#elif defined(__AVX__)
constexpr int kNativeLanes = 8, kFloatRows = 2;  // 8 of 16, and 4 for weights
#else
constexpr int kNativeLanes = 4, kFloatRows = 2;
#endif
constexpr int64_t kStrip = 2 * kNativeLanes;
typedef float Native __attribute__((vector_size(4 * kNativeLanes)));
typedef int32_t NativeInts __attribute__((vector_size(4 * kNativeLanes)));
typedef uint32_t NativeWords __attribute__((vector_size(4 * kNativeLanes)));
typedef int16_t NativeShorts __attribute__((vector_size(2 * kNativeLanes)));

constexpr int tile_rows(const float*) { return kFloatRows; }
constexpr bool one_pass(const float*) { return kStrip == kPanel; }  // over a block, for a tile of rows
constexpr int64_t row_sums(const float*) { return kPair; }

template <class V>
BLOCKDRAFT_INLINE V load_native(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
BLOCKDRAFT_INLINE void store_native(float* p, Native v) { __builtin_memcpy(p, &v, sizeof v); }

// The outputs of one vector.
struct PairOf {
  Native even, odd;
};

// From output c of a pair on.
BLOCKDRAFT_INLINE PairOf load_pair(const BFloat16* pair, int64_t c) {
  const NativeWords words = load_native<NativeWords>(pair + 2 * c);
  return {bits_as<Native>(words << 16), bits_as<Native>(words & 0xffff0000u)};
}

BLOCKDRAFT_INLINE PairOf load_pair(const float* pair, int64_t c) {
  return {load_native<Native>(pair + c), load_native<Native>(pair + kPanel + c)};
}

// Words of 16 bits: even k in the low byte, odd k in the high one.
BLOCKDRAFT_INLINE PairOf load_pair(const Int8* pair, int64_t c) {
  const NativeInts both = __builtin_convertvector(load_native<NativeShorts>(pair + 2 * c), NativeInts);
  return {__builtin_convertvector((both << 24) >> 24, Native), __builtin_convertvector(both >> 8, Native)};
}

// A byte of E4M3 at the end of each word, in float32, as to_float(Float8).
BLOCKDRAFT_INLINE Native float8_values(NativeWords bytes) {
  const NativeInts size = bits_as<NativeInts>(bytes & 0x7fu);
  const NativeInts denormal = bits_as<NativeInts>(__builtin_convertvector(size, Native) * 0x1p-9f);
  const NativeInts normal = (size << 20) + (120 << 23), bits = size < 8 ? denormal : normal;
  return bits_as<Native>(bits_as<NativeWords>(bits) | (bytes & 0x80u) << 24);
}

BLOCKDRAFT_INLINE PairOf load_pair(const Float8* pair, int64_t c) {
  const NativeWords both =
      bits_as<NativeWords>(__builtin_convertvector(load_native<NativeShorts>(pair + 2 * c), NativeInts));
  return {float8_values(both & 0xffu), float8_values((both >> 8) & 0xffu)};
}

// sums [kRows][64] += x [kRows, 2 * pairs] panel, of kStrip outputs from c on.
template <int kRows, bool kFirst, class W>
static inline void multiply_strip(const float* x, int64_t stride, const W* panel, int64_t c, int64_t pairs,
                                  float* sums) {
  Native even[kRows][2], odd[kRows][2];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 2; ++j) {
      even[i][j] = load_native<Native>(sums + i * kPair + c + j * kNativeLanes);
      odd[i][j] = load_native<Native>(sums + i * kPair + kPanel + c + j * kNativeLanes);
    }
  for (int64_t k = 0; k < pairs; ++k, panel += kPair) {
    prefetch_next<kFirst>(panel);
    const PairOf w[2] = {load_pair(panel, c), load_pair(panel, c + kNativeLanes)};
    for (int i = 0; i < kRows; ++i) {
      const float x0 = x[i * stride + 2 * k], x1 = x[i * stride + 2 * k + 1];
      for (int j = 0; j < 2; ++j) {
        even[i][j] += w[j].even * x0;
        odd[i][j] += w[j].odd * x1;
      }
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 2; ++j) {
      store_native(sums + i * kPair + c + j * kNativeLanes, even[i][j]);
      store_native(sums + i * kPair + kPanel + c + j * kNativeLanes, odd[i][j]);
    }
}

template <int kRows, bool kFirst, class W>
static inline void multiply_tile(const float* x, int64_t stride, const W* panel, int64_t pairs, float* sums) {
  multiply_strip<kRows, kFirst>(x, stride, panel, 0, pairs, sums);
  for (int64_t c = kStrip; c < kPanel; c += kStrip) multiply_strip<kRows, false>(x, stride, panel, c, pairs, sums);
}

BLOCKDRAFT_INLINE Vec total_of(const float*, const float* sums, int j) {
  return load(sums + j * kLanes) + load(sums + kPanel + j * kLanes);
}

// The sums of a panel's outputs as they stand in total[2], in order.
template <class X, class W>
BLOCKDRAFT_INLINE void order_outputs(const X*, const W*, Vec*) {}

// bfloat16 rows. Sums of a row: 32.

#ifdef __AVX512BF16__
constexpr int tile_rows(const BFloat16*) { return 8; }  // 8 to 13 ran at 2 instructions a cycle, 6 at 1.8, 4 at 1.3
constexpr bool one_pass(const BFloat16*) { return true; }
constexpr int64_t row_sums(const BFloat16*) { return kPanel; }

struct Operands {
  __m512bh pairs[2];  // of 16 outputs each
};

BLOCKDRAFT_INLINE Operands load_operands(const BFloat16* panel) {
  return {{bits_as<__m512bh>(load_words(panel)), bits_as<__m512bh>(load_words(panel + kPanel))}};
}

// The bytes of 128 values without sign in bfloat16, for two table lookups by 7 bits.
struct ByteTables {
  alignas(64) uint8_t low[128], high[128];
  template <class ValueOf>
  constexpr explicit ByteTables(ValueOf value_of) : low(), high() {
    for (int i = 0; i < 128; ++i) {
      const uint16_t bits = from_float<BFloat16>(value_of(i)).bits;
      low[i] = bits & 0xff, high[i] = bits >> 8;
    }
  }
};
constexpr ByteTables kSizes([](int i) { return static_cast<float>(i); });
constexpr ByteTables kFloat8Sizes([](int i) { return to_float(Float8{static_cast<uint8_t>(i)}); });

// Unpacking works within 16 bytes, the pairs of 8 outputs: the first operand has the first four of each 8, the second
// one the others. A fifth permutation would put them in order here; order_outputs does it once for a sum.
BLOCKDRAFT_INLINE Operands look_up(const ByteTables& tables, __m512i sizes, __m512i values) {
  const __m512i signs = _mm512_and_si512(values, _mm512_set1_epi8(-128));
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_load_si512(tables.low), sizes, _mm512_load_si512(tables.low + 64));
  const __m512i high = _mm512_or_si512(
      _mm512_permutex2var_epi8(_mm512_load_si512(tables.high), sizes, _mm512_load_si512(tables.high + 64)), signs);
  return {{bits_as<__m512bh>(_mm512_unpacklo_epi8(low, high)), bits_as<__m512bh>(_mm512_unpackhi_epi8(low, high))}};
}
BLOCKDRAFT_INLINE Operands load_operands(const Int8* panel) {
  const __m512i values = _mm512_loadu_si512(panel);
  return look_up(kSizes, _mm512_abs_epi8(values), values);
}
BLOCKDRAFT_INLINE Operands load_operands(const Float8* panel) {
  const __m512i values = _mm512_loadu_si512(panel);  // a lookup takes the lower 7 bits
  return look_up(kFloat8Sizes, values, values);
}

BLOCKDRAFT_INLINE void order_bytes(Vec* total) {
  const Vec a = total[0], b = total[1];
  total[0] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  total[1] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
}
BLOCKDRAFT_INLINE void order_outputs(const BFloat16*, const Int8*, Vec* total) { order_bytes(total); }
BLOCKDRAFT_INLINE void order_outputs(const BFloat16*, const Float8*, Vec* total) { order_bytes(total); }

template <int kRows, bool kFirst, class W>
static inline void multiply_tile(const BFloat16* x, int64_t stride, const W* panel, int64_t pairs, float* sums) {
  Vec sum[kRows][2];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 2; ++j) sum[i][j] = load(sums + i * kPanel + j * kLanes);
  for (int64_t k = 0; k < pairs; ++k, panel += kPair) {
    prefetch_next<kFirst>(panel);
    const Operands w = load_operands(panel);
    for (int i = 0; i < kRows; ++i) {
      uint32_t pair;
      __builtin_memcpy(&pair, x + i * stride + 2 * k, sizeof pair);
      const __m512bh both = bits_as<__m512bh>(pair - WordVec{});
      for (int j = 0; j < 2; ++j)
        sum[i][j] = bits_as<Vec>(_mm512_dpbf16_ps(bits_as<__m512>(sum[i][j]), w.pairs[j], both));
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 2; ++j) store(sums + i * kPanel + j * kLanes, sum[i][j]);
}

BLOCKDRAFT_INLINE Vec total_of(const BFloat16*, const float* sums, int j) { return load(sums + j * kLanes); }

constexpr int64_t few_rows(const BFloat16*) { return 4; }

// All of two panels at once: the sums of one panel alone are two chains for a row, which wait for each other's ends
// where bytes come fast.
template <int kRows, class W, class Out>
static inline void multiply_few_rows(const BFloat16* x, int64_t stride, const W* panel, int64_t distance, int64_t pairs,
                                     Out out) {
  Vec sum[kRows][4] = {};
  for (int64_t k = 0; k < pairs; ++k, panel += kPair) {
    const Operands w[2] = {load_operands(panel), load_operands(panel + distance)};
    for (int i = 0; i < kRows; ++i) {
      uint32_t pair;
      __builtin_memcpy(&pair, x + i * stride + 2 * k, sizeof pair);
      const __m512bh both = bits_as<__m512bh>(pair - WordVec{});
      for (int j = 0; j < 4; ++j)
        sum[i][j] = bits_as<Vec>(_mm512_dpbf16_ps(bits_as<__m512>(sum[i][j]), w[j / 2].pairs[j % 2], both));
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 4; j += 2) order_outputs(x, panel, sum[i] + j);
    out(i, sum[i]);
  }
}
#endif

constexpr int64_t few_rows(const float*) { return 0; }  // four chains for a row are enough

template <int kMost, class X, class W>
BLOCKDRAFT_INLINE void multiply_rest(int64_t rows, const X* x, int64_t stride, const W* panel, int64_t pairs,
                                     float* sums) {
  if constexpr (kMost > 0) {
    if (rows == kMost) return multiply_tile<kMost, false>(x, stride, panel, pairs, sums);
    multiply_rest<kMost - 1>(rows, x, stride, panel, pairs, sums);
  }
}

// sums [rows] += x [rows, 2 * pairs] panel, at most kBlockPairs pairs of more than a few rows; row_sums floats a row.
// kCold: the panel comes from memory.
template <bool kCold = true, class X, class W>
static inline void accumulate_block(const X* x, int64_t stride, int64_t rows, const W* panel, int64_t pairs,
                                    float* sums) {
  constexpr int kTileRows = tile_rows(static_cast<const X*>(nullptr));
  constexpr int64_t kSums = row_sums(static_cast<const X*>(nullptr));
  int64_t i = 0;
  if (rows >= kTileRows) {
    multiply_tile<kTileRows, kCold>(x, stride, panel, pairs, sums);
    i = kTileRows;
  }
  for (; i + kTileRows <= rows; i += kTileRows)
    multiply_tile<kTileRows, false>(x + i * stride, stride, panel, pairs, sums + i * kSums);
  multiply_rest<kTileRows - 1>(rows - i, x + i * stride, stride, panel, pairs, sums + i * kSums);
}

// out(row, sums of 32 outputs) for every row of x [rows, 2 * pairs], whose rows are `stride` values apart.
template <class X, class W, class Out>
static inline void multiply_panel(const X* x, int64_t stride, int64_t rows, const W* panel, int64_t pairs, Out out) {
  constexpr int kTileRows = tile_rows(static_cast<const X*>(nullptr));
  constexpr int64_t kSums = row_sums(static_cast<const X*>(nullptr));
  alignas(64) float sums[kBlockRows * kSums];
  for (int64_t first = 0; first < rows; first += kBlockRows) {
    const int64_t count = minimum(rows - first, kBlockRows);
    __builtin_memset(sums, 0, count * kSums * sizeof(float));
    const int64_t step = count <= kTileRows && one_pass(x) ? pairs : kBlockPairs;
    for (int64_t k = 0; k < pairs; k += step)
      accumulate_block(x + first * stride + 2 * k, stride, count, panel + k * kPair, minimum(pairs - k, step), sums);
    for (int64_t i = 0; i < count; ++i) {
      Vec total[2] = {total_of(x, sums + i * kSums, 0), total_of(x, sums + i * kSums, 1)};
      order_outputs(x, panel, total);
      out(first + i, total);
    }
  }
}

template <int kMost, class X, class W, class Out>
BLOCKDRAFT_INLINE void choose_few_rows(int64_t rows, const X* x, int64_t stride, const W* panel, int64_t distance,
                                       int64_t pairs, Out out) {
  if constexpr (kMost > 0) {
    if (rows == kMost) return multiply_few_rows<kMost>(x, stride, panel, distance, pairs, out);
    choose_few_rows<kMost - 1>(rows, x, stride, panel, distance, pairs, out);
  }
}

// out(row, sums of 32 and 32 outputs) for at most kBlockRows rows and two panels, one after the other.
template <class X, class Panel, class Out>
static inline void multiply_in_turn(const X* x, int64_t stride, int64_t rows, Panel panel, Panel next, int64_t pairs,
                                    Out out) {
  Vec first[kBlockRows][4];
  multiply_panel(x, stride, rows, panel, pairs, [&](int64_t t, const Vec(&total)[2]) {
    first[t][0] = total[0];
    first[t][1] = total[1];
  });
  multiply_panel(x, stride, rows, next, pairs, [&](int64_t t, const Vec(&total)[2]) {
    first[t][2] = total[0];
    first[t][3] = total[1];
    out(t, first[t]);
  });
}

// The same for a panel and the one behind it in memory, with the bits of multiply_panel.
template <class X, class W, class Out>
static inline void multiply_two_panels(const X* x, int64_t stride, int64_t rows, const W* panel, int64_t pairs,
                                       Out out) {
  constexpr int64_t kFewRows = few_rows(static_cast<const X*>(nullptr));
  const int64_t distance = pairs * kPair;
  if (rows <= kFewRows) return choose_few_rows<kFewRows>(rows, x, stride, panel, distance, pairs, out);
  multiply_in_turn(x, stride, rows, panel, panel + distance, pairs, out);
}

// The first n of 32 outputs to out, in the storage type.
template <class T>
BLOCKDRAFT_INLINE void store_panel(T* out, const Vec (&total)[2], int64_t n) {
  if (n >= kPanel) {
    store(out, total[0]);
    store(out + kLanes, total[1]);
    return;
  }
  for (int64_t c = 0; c < n; ++c) narrow(total[c / kLanes][c % kLanes], out + c);
}

// x, rounded to T, into a row of T that will meet weights.
template <class T>
BLOCKDRAFT_INLINE void narrow_to_row(float x, RowOf<T>* out) {
  narrow(as_stored<T>(x), out);
}

// K values of T to `stride` values as products read them; what lies between becomes 0.
template <class T>
BLOCKDRAFT_INLINE void arrange_row(const T* x, int64_t K, RowOf<T>* out, int64_t stride) {
  for (int64_t k = 0; k < K; ++k) {
    if constexpr (sizeof(T) == sizeof(*out))
      out[k] = x[k];
    else
      out[k] = widen(x[k]);
  }
  for (int64_t k = K; k < stride; ++k) out[k] = RowOf<T>{};
}

}  // namespace blockdraft::cpu
