#include "ops/pack_weight.h"

#include "common/host.h"
#include "common/huge_pages.h"

namespace blockdraft {
namespace {

Tensor pack_weight(const Tensor& weight, int64_t halves) {
  Dim E{"E"}, N{"N"}, K{"K"};
  const Checker checker("pack_weight", weight);
  const bool stacked = weight.dim() == 3;
  const auto dtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Char, ScalarType::Float8_e4m3fn,
                       ScalarType::Byte};
  if (stacked)
    checker.tensor(weight, "weight", {&E, &N, &K}, dtypes);
  else
    checker.tensor(weight, "weight", {&N, &K}, dtypes);
  check(halves == 1 || halves == 2, "pack_weight: halves must be 1 or 2, got ", halves);
  check(N > 0 && K > 0 && N % halves == 0, "pack_weight: weight must have rows divisible by halves=", halves,
        " and at least one column, got [", N.size, ", ", K.size, "]");

  const bool mx = weight.scalar_type() == ScalarType::Byte;
  check(!mx || 2 * K.size % kMxBlock == 0, "pack_weight: weight of Byte, two columns each, must have whole blocks of ",
        kMxBlock, " columns, got ", 2 * K.size);

  const int64_t count = stacked ? E.size : 1;
  const int64_t panels = halves * ceil_div(N / halves, kPanelOutputs), pairs = mx ? K.size : ceil_div(K, 2);
  std::vector<int64_t> size{panels, pairs, pair_dim(weight.scalar_type()).size};
  if (stacked) size.insert(size.begin(), count);
  Tensor packed = torch::stable::new_empty(weight, size);
  const PackWeightParams p{.weight = weight.const_data_ptr(),
                           .packed = packed.mutable_data_ptr(),
                           .E = count,
                           .N = N,
                           .K = mx ? 2 * K.size : K.size,
                           .halves = halves,
                           .panels = panels,
                           .pairs = pairs,
                           .dtype = to_dtype(weight.scalar_type())};
  if constexpr (kBackend == Backend::kCpu) {
    use_huge_pages(reinterpret_cast<uintptr_t>(packed.mutable_data_ptr()), packed.numel() * packed.element_size());
    run_tasks(cpu::pack_weight, p, count * panels);
  } else {
    launch_gpu("pack_weight", weight, [&](void* stream) { return gpu::pack_weight(p, stream); });
  }
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BLOCKDRAFT_NAMESPACE, m) {
  if constexpr (kDefinesSchemas) m.def("pack_weight(Tensor weight, int halves) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(BLOCKDRAFT_NAMESPACE, BLOCKDRAFT_KEY, m) { m.impl("pack_weight", TORCH_BOX(&pack_weight)); }

}  // namespace blockdraft
