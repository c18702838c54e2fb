#pragma once
// Sixteen float lanes for the CPU kernels, which are compiled once per instruction set (CMakeLists.txt) with
// BLOCKDRAFT_ISA naming the set. The vector type is GCC's and clang's own: one 512-bit register, two of 256 bits or
// four of 128, with the same lanes in each case.
//
// Everything here and in the kernels has internal linkage, and kernels use no standard-library templates: the linker
// keeps one copy of an inline function, and a machine without AVX-512 would stop at the AVX-512 one.
#include <cstdint>

#include "common/dtype.h"

#define BLOCKDRAFT_INLINE static inline __attribute__((always_inline))

namespace blockdraft::cpu {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t WordVec __attribute__((vector_size(64)));
typedef uint64_t LongVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));

template <class To, class From>
BLOCKDRAFT_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

BLOCKDRAFT_INLINE Vec splat(float x) { return x - Vec{}; }
BLOCKDRAFT_INLINE float maximum(float a, float b) { return a < b ? b : a; }
BLOCKDRAFT_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
BLOCKDRAFT_INLINE int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

BLOCKDRAFT_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
BLOCKDRAFT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

BLOCKDRAFT_INLINE WordVec load_words(const void* p) {
  WordVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

BLOCKDRAFT_INLINE float widen(float x) { return x; }
BLOCKDRAFT_INLINE float widen(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to nearest, ties to even; a NaN stays one.
BLOCKDRAFT_INLINE void narrow(float x, float* out) { *out = x; }
BLOCKDRAFT_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = bits_as<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A value as it will be read back from storage of type T.
template <class T>
BLOCKDRAFT_INLINE float as_stored(float x) {
  T stored;
  narrow(x, &stored);
  return widen(stored);
}

// The same for sixteen values.
BLOCKDRAFT_INLINE Vec load(const BFloat16* p) {
  HalfVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return bits_as<Vec>(__builtin_convertvector(v, WordVec) << 16);
}
BLOCKDRAFT_INLINE void store(BFloat16* p, Vec x) {
  const WordVec bits = bits_as<WordVec>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfVec v = __builtin_convertvector(x != x ? WordVec{} + 0x7fc0 : rounded, HalfVec);
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
BLOCKDRAFT_INLINE Vec as_stored(Vec x) {
  T stored[kLanes];
  store(stored, x);
  return load(stored);
}

// One value from all lanes, halving: the order is the same on every instruction set. What comes from past the half does
// not matter.
template <class V, class F>
BLOCKDRAFT_INLINE V fold_lanes(V v, F f) {
  v = f(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
  v = f(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7));
  v = f(v, __builtin_shufflevector(v, v, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3));
  return f(v, __builtin_shufflevector(v, v, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1));
}
BLOCKDRAFT_INLINE float sum_lanes(Vec v) {
  return fold_lanes(v, [](Vec a, Vec b) { return a + b; })[0];
}
BLOCKDRAFT_INLINE float max_lanes(Vec v) {
  return fold_lanes(v, [](Vec a, Vec b) { return a < b ? b : a; })[0];
}
BLOCKDRAFT_INLINE bool any_lane(IntVec mask) {
  return fold_lanes(mask, [](IntVec a, IntVec b) { return a | b; })[0] != 0;
}

// exp by reduction to |r| <= ln(2) / 2 and the Taylor series to r^7: relative error below 2e-7, exactly 1 at 0 and
// exactly 0 below -87 (float32 denormals are not produced), so that masked scores of -inf vanish.
BLOCKDRAFT_INLINE Vec exp(Vec x) {
  const IntVec vanishes = x < -87.0f;
  x = x > 88.0f ? splat(88.0f) : x;
  x = vanishes ? splat(0.0f) : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded exponent
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln(2) in two parts: the first product is exact
  Vec p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec exponent = bits_as<IntVec>(shifted) << 23;
  const Vec result = bits_as<Vec>(bits_as<IntVec>(p) + exponent);
  return vanishes ? splat(0.0f) : result;
}
BLOCKDRAFT_INLINE float exp(float x) { return exp(splat(x))[0]; }

// log of positive normal numbers by atanh: m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1), |s| <= 0.172, terms to
// s^9: relative error below 2e-7.
BLOCKDRAFT_INLINE Vec log(Vec x) {
  const IntVec bits = bits_as<IntVec>(x);
  const IntVec exponent = (bits - 0x3f3504f3) >> 23;
  const Vec f = bits_as<Vec>(bits - (exponent << 23)) - 1.0f;
  const Vec s = f / (f + 2.0f), t = s * s;
  Vec p = splat(1.0f / 9);
  p = p * t + 1.0f / 7;
  p = p * t + 1.0f / 5;
  p = p * t + 1.0f / 3;
  const Vec e = __builtin_convertvector(exponent, Vec);
  return e * 0.693359375f + (e * -2.12194440e-4f + (2.0f * s * (t * p) + 2.0f * s));
}
BLOCKDRAFT_INLINE float log(float x) { return log(splat(x))[0]; }

// erf as x P(x^2) below 0.9, and above as 1 - exp(-Q(|x|)), where Q is a fit of -log(erfc): relative error below 2e-7.
BLOCKDRAFT_INLINE Vec erf(Vec x) {
  const Vec size = x < 0.0f ? -x : x, t = size > 4.0f ? splat(4.0f) : size, s = x * x;
  Vec p = splat(-0.000610698957f);
  p = p * s + 0.00501535735f;
  p = p * s - 0.0267813398f;
  p = p * s + 0.112822121f;
  p = p * s - 0.376125306f;
  p = p * s + 1.12837916f;
  Vec q = splat(-1.61024041e-06f);
  q = q * t + 4.55127729e-05f;
  q = q * t - 0.000592092757f;
  q = q * t + 0.00473695062f;
  q = q * t - 0.0263551208f;
  q = q * t + 0.109960799f;
  q = q * t + 0.631956241f;
  q = q * t + 1.1301551f;
  q = q * t - 0.000300268821f;
  const Vec far = 1.0f - exp(-q);
  return size < 0.9f ? p * x : x < 0.0f ? -far : far;
}

BLOCKDRAFT_INLINE Vec gelu(Vec x) { return 0.5f * x * (1.0f + erf(x * 0.70710678f)); }
BLOCKDRAFT_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

}  // namespace blockdraft::cpu
