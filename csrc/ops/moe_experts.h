#pragma once
// Contract of moe_experts: each row through its expert.
//
//   out = weight * down_proj[id] (silu(gate) * up),   [gate ; up] = gate_up_proj[id] x
//
// Weights of int8 and Float8 have a float32 scale for each row, by which the float32 sums of that row are multiplied.
// Weights of Mxfp4 are multiplied by their scale, exactly, before they meet x: the bits are those of bfloat16 weights
// of the same values. A row with id E is skipped: out = 0, or weight * x with skip_identity, and no expert is touched.
// On a GPU, where the host does not look at values, a row with an id that is out of range gives NaN. The product
// silu(gate) * up is rounded to dtype, as in the model's training code.
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

struct MoeExpertsParams {
  const void* x;               // [T, H] of dtype
  const void* rows;            // CPU: x [T, 2 * pairs] as products read it, in the order of sorted_rows
  const int32_t* sorted_rows;  // CPU: [T], rows by expert, skipped rows last
  const int32_t* expert_rows;  // CPU: [touched + 1], where each touched expert's rows begin in sorted_rows
  const int32_t* expert_ids;   // CPU: [touched]
  const int32_t* topk_ids;     // [T], in [0, E]
  const float* topk_weights;   // [T]
  const void* gate_up_proj;    // packed [E, 2 * ceil(I / 32), pairs, 64] of weight_dtype, gate and up panels in turn
  const void* down_proj;       // packed [E, ceil(H / 32), inner_pairs, 64] of weight_dtype
  const void* gate_up_scales;  // kInt8, kFloat8: float [E, 2 * I]; kMxfp4: packed uint8_t [E, 2 * ceil(I / 32), H / 32,
                               // 32]; else nullptr
  const void* down_scales;     // float [E, H]; packed uint8_t [E, ceil(H / 32), I / 32, 32]; nullptr
  void* hidden;                // scratch [T, hidden_stride]. CPU: as rows; GPU: of dtype, row by row
  void* out;                   // [T, H] of dtype
  int64_t T, H, I, E, touched, pairs, inner_pairs, hidden_stride;
  DType dtype, weight_dtype;  // weight_dtype: dtype, kInt8, kFloat8, or kMxfp4, of which H and I are whole blocks
  bool skip_identity;
};

namespace cpu {
// (expert, panel pair) tasks [begin, end) of touched * ceil(I / 32): hidden.
void moe_experts_up(const MoeExpertsParams& p, int64_t begin, int64_t end);
// (expert, panel) tasks [begin, end) of touched * ceil(H / 32): out of the routed rows.
void moe_experts_down(const MoeExpertsParams& p, int64_t begin, int64_t end);
// Entries [begin, end) of sorted_rows, all skipped.
void moe_experts_skip(const MoeExpertsParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* moe_experts(const MoeExpertsParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
