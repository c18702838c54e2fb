#pragma once
// What several host functions share: pointers for the Params structs, CPU tasks, and checks of index values.
#include <algorithm>
#include <optional>
#include <string>

#include "common/backend.h"
#include "common/cpu_isa.h"
#include "ops/packed_linear.h"

namespace blockdraft {

inline constexpr int64_t kPanelOutputs = 32, kPanelPair = 64;  // csrc/cpu/gemm.h

inline int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Uninitialised memory on the device of t.
inline Tensor scratch(const Tensor& t, std::initializer_list<int64_t> size, ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(t, std::vector<int64_t>(size), dtype);
}

// kernel(p, begin, end) over [0, tasks), at least `grain` tasks a thread.
template <class Params>
void run_tasks(void (*kernel)(const Params&, int64_t, int64_t), const Params& p, int64_t tasks, int64_t grain = 1) {
  cpu_isa();  // a wrong BLOCKDRAFT_CPU_ISA throws here: inside the loop torch would replace the message
  if (tasks > 0)
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, grain),
                                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// Index values are looked at on the CPU only: on a GPU that would be a synchronization, and kernels guard instead.
template <class T>
void check_values(const char* op, const char* name, const Tensor& t, int64_t low, int64_t high) {
  if constexpr (kBackend != Backend::kCpu) return;
  const T* values = read<T>(t);
  for (int64_t i = 0; i < t.numel(); ++i)
    if (values[i] < low || values[i] > high)
      throw std::runtime_error(std::string(op) + ": " + name + " must be in [" + std::to_string(low) + ", " +
                               std::to_string(high) + "], got " + std::to_string(values[i]) + " at " +
                               std::to_string(i));
}

// x as a CPU matrix product reads it: x itself where it already is so, otherwise a copy, with the rows in the order
// given (int32 [T], nullptr for their own).
class ProductRows {
 public:
  ProductRows(const Tensor& x, const int32_t* order = nullptr) {
    const int64_t T = x.size(0), K = x.size(1), stride = 2 * ceil_div(K, 2);
    const ScalarType dtype = row_dtype(x.scalar_type());
    if (x.scalar_type() == dtype && stride == K && !order) {
      rows_ = x.const_data_ptr();
      return;
    }
    storage_ = scratch(x, {T, stride}, dtype);
    rows_ = storage_->const_data_ptr();
    const ArrangeRowsParams p{.x = x.const_data_ptr(),
                              .order = order,
                              .out = storage_->mutable_data_ptr(),
                              .T = T,
                              .K = K,
                              .stride = stride,
                              .dtype = to_dtype(x.scalar_type())};
    run_tasks(cpu::arrange_rows, p, T, 16384 / std::max<int64_t>(1, K));
  }
  const void* rows() const { return rows_; }

  // Of the rows that meet weights of this type.
  static ScalarType row_dtype(ScalarType weight) {
    return multiplies_pairs() && weight == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  }

 private:
  std::optional<Tensor> storage_;
  const void* rows_;
};

}  // namespace blockdraft
