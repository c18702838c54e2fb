// Chooses between the builds of each CPU kernel. The only file of this folder that is compiled once.
#include "common/cpu_isa.h"
#include "ops/block_attention.h"
#include "ops/cca_mix.h"
#include "ops/choose_tokens.h"
#include "ops/commit_states.h"
#include "ops/lm_head_choose.h"
#include "ops/moe_experts.h"
#include "ops/moe_router.h"
#include "ops/pack_weight.h"
#include "ops/packed_embedding.h"
#include "ops/packed_linear.h"
#include "ops/reject_drafts.h"
#include "ops/residual_norm.h"
#include "ops/verify_tokens.h"

#ifdef __x86_64__
#define BLOCKDRAFT_CPU_KERNEL(name, Params)                                       \
  namespace base {                                                                \
  void name(const Params& p, int64_t begin, int64_t end);                         \
  }                                                                               \
  namespace avx2 {                                                                \
  void name(const Params& p, int64_t begin, int64_t end);                         \
  }                                                                               \
  namespace avx512 {                                                              \
  void name(const Params& p, int64_t begin, int64_t end);                         \
  }                                                                               \
  namespace avx512bf16 {                                                          \
  void name(const Params& p, int64_t begin, int64_t end);                         \
  }                                                                               \
  void name(const Params& p, int64_t begin, int64_t end) {                        \
    if (cpu_isa() == CpuIsa::kAvx512Bf16) return avx512bf16::name(p, begin, end); \
    if (cpu_isa() == CpuIsa::kAvx512) return avx512::name(p, begin, end);         \
    if (cpu_isa() == CpuIsa::kAvx2) return avx2::name(p, begin, end);             \
    base::name(p, begin, end);                                                    \
  }
#else
#define BLOCKDRAFT_CPU_KERNEL(name, Params)               \
  namespace base {                                        \
  void name(const Params& p, int64_t begin, int64_t end); \
  }                                                       \
  void name(const Params& p, int64_t begin, int64_t end) { base::name(p, begin, end); }
#endif

namespace blockdraft::cpu {

BLOCKDRAFT_CPU_KERNEL(block_attention, BlockAttentionParams)
BLOCKDRAFT_CPU_KERNEL(block_attention_merge, BlockAttentionParams)
BLOCKDRAFT_CPU_KERNEL(cca_mix, CcaMixParams)
BLOCKDRAFT_CPU_KERNEL(cca_mix_rotary, CcaMixParams)
BLOCKDRAFT_CPU_KERNEL(cca_mix_store, CcaMixParams)
BLOCKDRAFT_CPU_KERNEL(choose_tokens, ChooseTokensParams)
BLOCKDRAFT_CPU_KERNEL(commit_states, CommitStatesParams)
BLOCKDRAFT_CPU_KERNEL(lm_head_choose, LmHeadChooseParams)
BLOCKDRAFT_CPU_KERNEL(lm_head_choose_merge, LmHeadChooseParams)
BLOCKDRAFT_CPU_KERNEL(moe_experts_down, MoeExpertsParams)
BLOCKDRAFT_CPU_KERNEL(moe_experts_skip, MoeExpertsParams)
BLOCKDRAFT_CPU_KERNEL(moe_experts_up, MoeExpertsParams)
BLOCKDRAFT_CPU_KERNEL(moe_router, MoeRouterParams)
BLOCKDRAFT_CPU_KERNEL(moe_router_down, MoeRouterParams)
BLOCKDRAFT_CPU_KERNEL(pack_weight, PackWeightParams)
BLOCKDRAFT_CPU_KERNEL(packed_embedding, PackedEmbeddingParams)
BLOCKDRAFT_CPU_KERNEL(packed_linear, PackedLinearParams)
BLOCKDRAFT_CPU_KERNEL(reject_drafts, RejectDraftsParams)
BLOCKDRAFT_CPU_KERNEL(residual_norm, ResidualNormParams)
BLOCKDRAFT_CPU_KERNEL(verify_tokens, VerifyTokensParams)
BLOCKDRAFT_CPU_KERNEL(arrange_rows, ArrangeRowsParams)

}  // namespace blockdraft::cpu
