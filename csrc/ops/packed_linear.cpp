#include "ops/packed_linear.h"

#include "ops/run.h"

namespace blockdraft {
namespace {

Tensor packed_linear(const Tensor& x, const Tensor& packed_weight, int64_t out_features, bool out_float32) {
  Dim T{"T"}, K{"K"}, panels{"panels"}, pairs{"pairs"}, pair{"64", kPanelPair};
  const Checker checker("packed_linear", x);
  checker.tensor(x, "x", {&T, &K}, {ScalarType::Float, ScalarType::BFloat16});
  checker.tensor(packed_weight, "packed_weight", {&panels, &pairs, &pair}, {x.scalar_type()});
  check(K > 0, "packed_linear: K must be positive, got ", K.size);
  checker.size("pairs of packed_weight", pairs, ceil_div(K, 2));
  checker.size("panels of packed_weight", panels, ceil_div(out_features, kPanelOutputs));

  const ScalarType dtype = out_float32 ? ScalarType::Float : x.scalar_type();
  Tensor out = torch::stable::new_empty(x, {T, out_features}, dtype);
  if (T == 0) return out;
  const PackedLinearParams p{.x = x.const_data_ptr(),
                             .rows = nullptr,
                             .packed = packed_weight.const_data_ptr(),
                             .out = out.mutable_data_ptr(),
                             .T = T,
                             .N = out_features,
                             .K = K,
                             .panels = panels,
                             .pairs = pairs,
                             .dtype = to_dtype(x.scalar_type()),
                             .out_float32 = out_float32};
  Workspace workspace(x);
  run(p, workspace);
  return out;
}

}  // namespace

void run(PackedLinearParams p, Workspace& workspace, [[maybe_unused]] const ResidualNormParams* norm,
         [[maybe_unused]] int32_t* arrivals) {
  if constexpr (kBackend == Backend::kCpu) {
    p.rows = product_rows(p.x, p.T, p.K, p.dtype, workspace);
    run_tasks(cpu::packed_linear, p, p.panels, 16384 / (p.pairs * p.T));
  } else {
    launch_gpu("packed_linear", workspace.like(), [&](void* stream) {
      return norm ? gpu::packed_linear_norm(p, *norm, arrivals, stream) : gpu::packed_linear(p, stream);
    });
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas)
    m.def("packed_linear(Tensor x, Tensor packed_weight, int out_features, bool out_float32) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) {
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
}

}  // namespace blockdraft
