#pragma once
// Contract of residual_norm: merge a layer's output into the residual stream, then RMS-normalise the stream.
//
//   layer        = (hidden_states + hidden_states_bias) * hidden_states_scale
//   residual_out = layer + (residual + residual_bias) * residual_scale          (layer alone where residual is absent)
//   normed       = stored / sqrt(mean(stored^2) + eps) * norm_weight,  stored = residual_out rounded to dtype
//
// float32 throughout: the product of 80 residual scales is about 7e-6 in ZAYA1-8B, too much for a bfloat16 stream. The
// norm reads the rounded stream, as transformers does.
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

struct ResidualNormParams {
  const void* hidden_states;         // [T, H] of dtype
  const float* residual;             // [T, H], may be nullptr
  const float* hidden_states_scale;  // [H]
  const float* hidden_states_bias;   // [H]
  const float* residual_scale;       // [H], nullptr where residual is
  const float* residual_bias;        // [H], nullptr where residual is
  const float* norm_weight;          // [H]
  void* normed;                      // [T, H] of dtype
  float* residual_out;               // [T, H]
  int64_t T, H;
  float eps;
  DType dtype;
};

namespace cpu {
// Rows [begin, end).
void residual_norm(const ResidualNormParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
// stream is a cudaStream_t or hipStream_t. Returns the runtime's error text, nullptr if there is none.
const char* residual_norm(const ResidualNormParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
