#include <initializer_list>

#include "gpu/device/compat.h"
#include "gpu/device/reduce.cuh"
#include "ops/residual_norm.h"

namespace blockdraft::gpu {
namespace {

constexpr int kThreads = 256;
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

// (values + bias) * scale
template <bool kAligned, class T>
__device__ Run<float> scaled_run(const T* values, const float* bias, const float* scale, int64_t h, int64_t H) {
  Run<float> x = load_run<kAligned>(values, h, H);
  const Run<float> b = load_run<kAligned>(bias, h, H), s = load_run<kAligned>(scale, h, H);
  for (int i = 0; i < kRun; ++i) x.at[i] = (x.at[i] + b.at[i]) * s.at[i];
  return x;
}

// One block per row. A thread has the same values, aligned or not.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) residual_norm_kernel(ResidualNormParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.H, begin = threadIdx.x * kRun;
  const T* hidden_states = static_cast<const T*>(p.hidden_states) + row;
  T* normed = static_cast<T*>(p.normed) + row;
  float* residual_out = p.residual_out + row;

  // Merge.
  float sum = 0;
  for (int64_t h = begin; h < p.H; h += kThreads * kRun) {
    Run<float> merged = scaled_run<kAligned>(hidden_states, p.hidden_states_bias, p.hidden_states_scale, h, p.H);
    if (p.residual) {
      const auto stream = scaled_run<kAligned>(p.residual + row, p.residual_bias, p.residual_scale, h, p.H);
      for (int i = 0; i < kRun; ++i) merged.at[i] += stream.at[i];
    }
    store_run<kAligned>(merged, residual_out, h, p.H);
    for (int i = 0; i < kRun; ++i) {
      const float stored = to_float(from_float<T>(merged.at[i]));
      sum += stored * stored;  // 0 past the end
    }
  }

  // Normalise. Each thread reads back what it wrote itself, so residual_out needs no barrier.
  const float inverse_rms = rsqrtf(block_sum<kThreads>(sum) / static_cast<float>(p.H) + p.eps);
  for (int64_t h = begin; h < p.H; h += kThreads * kRun) {
    Run<float> x = load_run<kAligned>(residual_out, h, p.H);
    const Run<float> weight = load_run<kAligned>(p.norm_weight, h, p.H);
    for (int i = 0; i < kRun; ++i) x.at[i] = to_float(from_float<T>(x.at[i])) * inverse_rms * weight.at[i];
    store_run<kAligned>(x, normed, h, p.H);
  }
}

bool is_aligned(const ResidualNormParams& p) {
  for (const void* pointer :
       std::initializer_list<const void*>{p.hidden_states, p.residual, p.hidden_states_scale, p.hidden_states_bias,
                                          p.residual_scale, p.residual_bias, p.norm_weight, p.normed, p.residual_out})
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  return p.H % kRun == 0;
}

template <class T, bool kAligned>
void launch(const ResidualNormParams& p, void* stream) {
  BLOCKDRAFT_LAUNCH((residual_norm_kernel<T, kAligned>), dim3(p.T), dim3(kThreads), 0, stream, p);
}

}  // namespace

const char* residual_norm(const ResidualNormParams& p, void* stream) {
  visit_dtype(p.dtype, [&](auto tag) {
    is_aligned(p) ? launch<decltype(tag), true>(p, stream) : launch<decltype(tag), false>(p, stream);
  });
  return last_error();
}

}  // namespace blockdraft::gpu
