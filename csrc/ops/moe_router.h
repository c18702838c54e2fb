#pragma once
// Contract of moe_router: the whole router of a ZAYA1 MoE block.
//
//   z  = down_proj x + bias (+ router_states * router_states_scale from layer 1 on)   next layer's router state
//   h  = gelu(fc2 gelu(fc1 rms_norm(z) + b1) + b2)                                     exact (erf) GELU
//   p  = softmax(out_proj h)                                                          E experts and the skip class E
//   id = argmax(p + balancing_biases), the lowest id of equals;  weight = p[id]
//
// float32 between the products: top-1 routing turns rounding into a change of expert.
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

struct MoeRouterParams {
  const void* x;                     // [T, H] of dtype
  const void* rows;                  // CPU: x [T, 2 * pairs] as products read it (packed_linear.h)
  const float* router_states;        // [T, R], may be nullptr (layer 0)
  const float* router_states_scale;  // [R], nullptr where router_states is
  const void* down_proj;             // packed [ceil(R / 32), pairs, 64] of dtype
  const float* down_proj_bias;       // [R]
  const float* norm_weight;          // [R]
  const void* fc1;                   // packed [ceil(R / 32), ceil(R / 2), 64] of dtype
  const float* fc1_bias;             // [R]
  const void* fc2;                   // packed, as fc1
  const float* fc2_bias;             // [R]
  const void* out_proj;              // packed [ceil((E + 1) / 32), ceil(R / 2), 64] of dtype
  const float* balancing_biases;     // [E + 1]
  float* hidden;                     // scratch. CPU: [2, T, hidden_stride]; GPU: [moe_router_hidden], nullptr for none
  float* topk_weights;               // [T]
  int32_t* topk_ids;                 // [T], E is skip
  float* router_states_out;          // [T, R]
  int64_t T, H, R, E, pairs, hidden_stride;
  float eps;
  DType dtype;
};

namespace cpu {
// Panels [begin, end) of down_proj: router_states_out.
void moe_router_down(const MoeRouterParams& p, int64_t begin, int64_t end);
// Rows [begin, end): everything after.
void moe_router(const MoeRouterParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
// Floats of scratch, 0 where shared memory holds the activations of a block.
int64_t moe_router_hidden(const MoeRouterParams& p);
const char* moe_router(const MoeRouterParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
