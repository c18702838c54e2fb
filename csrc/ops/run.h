#pragma once
// The operators below their checks: on pointers, with room of the caller's, for at least one row. decoder_forward runs
// them one after the other.
#include "common/host.h"
#include "ops/block_attention.h"
#include "ops/cca_mix.h"
#include "ops/moe_experts.h"
#include "ops/moe_router.h"
#include "ops/packed_embedding.h"
#include "ops/packed_linear.h"
#include "ops/residual_norm.h"

namespace blockdraft {

// Which task attends from which rows to which keys; empty on a GPU. Layers of one head count share it.
struct AttentionPlan {
  explicit AttentionPlan(const BlockAttentionParams& p);
  std::vector<AttentionTask> tasks;
  std::vector<int32_t> row_chunks;
};

void run(const PackedEmbeddingParams& p, Workspace& workspace);
// GPU: with the norm of what comes out (common/arrivals.h), nullptr for none.
void run(PackedLinearParams p, Workspace& workspace, const ResidualNormParams* norm = nullptr,
         int32_t* arrivals = nullptr);
void run(const ResidualNormParams& p, Workspace& workspace);
void run(CcaMixParams p, Workspace& workspace);  // CPU: makes p.rotary where it is nullptr
void run(BlockAttentionParams p, const AttentionPlan& plan, Workspace& workspace);
void run(MoeRouterParams p, Workspace& workspace);
void run(MoeExpertsParams p, Workspace& workspace);

// Which scales weights of experts have: int8 and Float8 one of float32 for each row, Mxfp4 packed bytes for its blocks.
inline bool has_row_scales(ScalarType weight) {
  return weight == ScalarType::Char || weight == ScalarType::Float8_e4m3fn;
}
inline bool has_block_scales(ScalarType weight) { return weight == ScalarType::Byte; }

// Mxfp4 knows whole blocks only.
inline void check_blocks(const char* op, ScalarType weight, int64_t H, int64_t I) {
  check(!has_block_scales(weight) || (H % kMxBlock == 0 && I % kMxBlock == 0), op,
        ": H and intermediate_size must be multiples of ", kMxBlock, " with weights of Byte, got ", H, " and ", I);
}

// CPU: [T, 2, half_rotary], p.rotary; nullptr on a GPU.
float* rotary_of(const CcaMixParams& p, Workspace& workspace);

// Sizes and, on the CPU, values that the kernels rely on; the error names the operator.
void check_sizes(const CcaMixParams& p);
void check_sizes(const BlockAttentionParams& p);
void check_rows(const BlockAttentionParams& p);

}  // namespace blockdraft
