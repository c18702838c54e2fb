#pragma once
// Contract of moe_experts: each row through its expert.
//
//   out = weight * down_proj[id] (silu(gate) * up),   [gate ; up] = gate_up_proj[id] x
//
// Weights of int8 have a float32 scale for each row, by which the float32 sums of that row are multiplied. A row with
// id E is skipped: out = 0, or weight * x with skip_identity, and no expert is touched. On a GPU, where the host does
// not look at values, a row with an id that is out of range gives NaN. The product silu(gate) * up is rounded to dtype,
// as in the model's training code.
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

struct MoeExpertsParams {
  const void* x;                // [T, H] of dtype
  const void* rows;             // CPU: x [T, 2 * pairs] as products read it, in the order of sorted_rows
  const int32_t* sorted_rows;   // CPU: [T], rows by expert, skipped rows last
  const int32_t* expert_rows;   // CPU: [touched + 1], where each touched expert's rows begin in sorted_rows
  const int32_t* expert_ids;    // CPU: [touched]
  const int32_t* topk_ids;      // [T], in [0, E]
  const float* topk_weights;    // [T]
  const void* gate_up_proj;     // packed [E, 2 * ceil(I / 32), pairs, 64] of weight_dtype, gate and up panels in turn
  const void* down_proj;        // packed [E, ceil(H / 32), inner_pairs, 64] of weight_dtype
  const float* gate_up_scales;  // [E, 2 * I], nullptr unless weight_dtype is int8
  const float* down_scales;     // [E, H], as gate_up_scales
  void* hidden;                 // scratch [T, hidden_stride]. CPU: as rows; GPU: of dtype, row by row
  void* out;                    // [T, H] of dtype
  int64_t T, H, I, E, touched, pairs, inner_pairs, hidden_stride;
  DType dtype, weight_dtype;  // weight_dtype: dtype or int8
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
