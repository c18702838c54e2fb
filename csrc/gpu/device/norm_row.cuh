#pragma once
// A row of residual_norm: by a block, one row each, or by a warp of a kernel whose last block goes on with the norm.
// Both take a row's values in runs of kRun, as kNormThreads threads would have them, and add up in the same order.
#include "gpu/device/compat.h"
#include "gpu/device/reduce.cuh"
#include "ops/residual_norm.h"

namespace blockdraft::gpu {

constexpr int kNormThreads = 256;
constexpr int kRun = 8;  // neighbouring values of a thread: 16 bytes of bfloat16

// One or two loads or stores of 16 bytes.
template <class T>
struct alignas(16) Run {
  T at[kRun];
};

// Values h .. h + 7 of H. kAligned: they are there, and at a multiple of 16 bytes.
template <bool kAligned, class T>
__device__ Run<float> load_run(const T* values, int64_t h, int64_t H) {
  Run<T> run = {};
  if constexpr (kAligned) {
    run = *reinterpret_cast<const Run<T>*>(values + h);
  } else {
    for (int i = 0; i < kRun; ++i)
      if (h + i < H) run.at[i] = values[h + i];
  }
  Run<float> wide;
  for (int i = 0; i < kRun; ++i) wide.at[i] = to_float(run.at[i]);
  return wide;
}

template <bool kAligned, class T>
__device__ void store_run(const Run<float>& wide, T* values, int64_t h, int64_t H) {
  Run<T> run;
  for (int i = 0; i < kRun; ++i) run.at[i] = from_float<T>(wide.at[i]);
  if constexpr (kAligned) {
    *reinterpret_cast<Run<T>*>(values + h) = run;
  } else {
    for (int i = 0; i < kRun; ++i)
      if (h + i < H) values[h + i] = run.at[i];
  }
}

// (values + bias) * scale. Of a sum of two such products a compiler may fuse either one, so neither is fused.
template <bool kAligned, class T>
__device__ Run<float> scaled_run(const T* values, const float* bias, const float* scale, int64_t h, int64_t H) {
  Run<float> x = load_run<kAligned>(values, h, H);
  const Run<float> b = load_run<kAligned>(bias, h, H), s = load_run<kAligned>(scale, h, H);
  for (int i = 0; i < kRun; ++i) x.at[i] = rounded_product(x.at[i] + b.at[i], s.at[i]);
  return x;
}

// Values h .. h + 7 of the stream; sum and their squares.
template <class T, bool kAligned>
__device__ float merge_run(const ResidualNormParams& p, int64_t row, int64_t h, float sum) {
  const T* hidden_states = static_cast<const T*>(p.hidden_states) + row;
  Run<float> merged = scaled_run<kAligned>(hidden_states, p.hidden_states_bias, p.hidden_states_scale, h, p.H);
  if (p.residual) {
    const auto stream = scaled_run<kAligned>(p.residual + row, p.residual_bias, p.residual_scale, h, p.H);
    for (int i = 0; i < kRun; ++i) merged.at[i] += stream.at[i];
  }
  store_run<kAligned>(merged, p.residual_out + row, h, p.H);
  for (int i = 0; i < kRun; ++i) {
    const float stored = to_float(from_float<T>(merged.at[i]));
    sum += rounded_product(stored, stored);  // 0 past the end
  }
  return sum;
}

template <class T, bool kAligned>
__device__ void normalise_run(const ResidualNormParams& p, int64_t row, int64_t h, float inverse_rms) {
  Run<float> x = load_run<kAligned>(p.residual_out + row, h, p.H);
  const Run<float> weight = load_run<kAligned>(p.norm_weight, h, p.H);
  for (int i = 0; i < kRun; ++i) x.at[i] = to_float(from_float<T>(x.at[i])) * inverse_rms * weight.at[i];
  store_run<kAligned>(x, static_cast<T*>(p.normed) + row, h, p.H);
}

// Row t by one warp: in turn what each warp of a block of kNormThreads would have.
template <class T, bool kAligned>
__device__ void norm_row(const ResidualNormParams& p, int64_t t) {
  const int64_t row = t * p.H, lane = threadIdx.x % kWarpSize;
  float total = 0;
#pragma unroll 1
  for (int first = 0; first < kNormThreads; first += kWarpSize) {
    float sum = 0;
    for (int64_t h = (first + lane) * kRun; h < p.H; h += kNormThreads * kRun)
      sum = merge_run<T, kAligned>(p, row, h, sum);
    sum = warp_sum(sum);
    total = first == 0 ? sum : total + sum;
  }
  const float inverse_rms = rsqrtf(total / static_cast<float>(p.H) + p.eps);
#pragma unroll 1
  for (int64_t h = lane * kRun; h < p.H; h += kWarpSize * kRun) normalise_run<T, kAligned>(p, row, h, inverse_rms);
}

// Rows [begin, end) by the kWarps warps of a block.
template <class T, int kWarps>
__device__ void norm_rows_of(const ResidualNormParams& p, bool aligned, int64_t begin, int64_t end) {
  for (int64_t t = begin + threadIdx.x / kWarpSize; t < end; t += kWarps)
    aligned ? norm_row<T, true>(p, t) : norm_row<T, false>(p, t);
}

// Whether all rows of all operands are at 16 bytes.
inline bool is_aligned(const ResidualNormParams& p) {
  const void* const pointers[] = {p.hidden_states,      p.residual,       p.hidden_states_scale,
                                  p.hidden_states_bias, p.residual_scale, p.residual_bias,
                                  p.norm_weight,        p.normed,         p.residual_out};
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  return p.H % kRun == 0;
}

}  // namespace blockdraft::gpu
