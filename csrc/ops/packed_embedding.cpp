#include "ops/packed_embedding.h"

#include "ops/run.h"

namespace blockdraft {
namespace {

Tensor packed_embedding(const Tensor& token_ids, const Tensor& packed_weight, int64_t num_embeddings,
                        int64_t embedding_dim) {
  Dim T{"T"}, panels{"panels"}, pairs{"pairs"}, pair{"64", kPanelPair};
  const Checker checker("packed_embedding", token_ids);
  checker.tensor(token_ids, "token_ids", {&T}, {ScalarType::Int});
  checker.tensor(packed_weight, "packed_weight", {&panels, &pairs, &pair}, {ScalarType::Float, ScalarType::BFloat16});
  checker.size("panels of packed_weight", panels, ceil_div(num_embeddings, kPanelOutputs));
  checker.size("pairs of packed_weight", pairs, ceil_div(embedding_dim, 2));
  check_values<int32_t>("packed_embedding", "token_ids", token_ids, 0, num_embeddings - 1);

  Tensor out = torch::stable::new_empty(packed_weight, {T, embedding_dim});
  const PackedEmbeddingParams p{.token_ids = read<int32_t>(token_ids),
                                .packed = packed_weight.const_data_ptr(),
                                .out = out.mutable_data_ptr(),
                                .arrivals = nullptr,
                                .T = T,
                                .V = num_embeddings,
                                .H = embedding_dim,
                                .pairs = pairs,
                                .arrival_count = 0,
                                .dtype = to_dtype(packed_weight.scalar_type())};
  Workspace workspace(token_ids);
  run(p, workspace);
  return out;
}

}  // namespace

void run(const PackedEmbeddingParams& p, Workspace& workspace) {
  if constexpr (kBackend == Backend::kCpu)
    run_tasks(cpu::packed_embedding, p, p.T, 8);
  else
    launch_gpu("packed_embedding", workspace.like(), [&](void* stream) { return gpu::packed_embedding(p, stream); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas)
    m.def("packed_embedding(Tensor token_ids, Tensor packed_weight, int num_embeddings, int embedding_dim) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) {
  m.impl("packed_embedding", TORCH_BOX(&packed_embedding));
}

}  // namespace blockdraft
