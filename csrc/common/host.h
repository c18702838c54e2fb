#pragma once
// What several host functions share: pointers for the Params structs, CPU tasks, and checks of index values.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "common/backend.h"
#include "common/cpu_isa.h"
#include "ops/packed_linear.h"

namespace blockdraft {

inline constexpr int64_t kPanelOutputs = 32, kPanelPair = 64;  // csrc/cpu/gemm.h

// The last size of a packed weight; Mxfp4 has two weights in a byte.
inline Dim pair_dim(ScalarType weight) {
  return weight == ScalarType::Byte ? Dim{"32", kPanelPair / 2} : Dim{"64", kPanelPair};
}

inline int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// An uninitialised tensor on the device of t.
inline Tensor scratch(const Tensor& t, std::initializer_list<int64_t> size, ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(t, std::vector<int64_t>(size), dtype);
}

// Memory that a call needs for itself, on the device of `like`. An allocation costs 0.7 us: a call that runs many
// operators takes at least `least` bytes at once.
class Workspace {
 public:
  explicit Workspace(const Tensor& like, int64_t least = 0) : like_(like), least_(least) {}

  const Tensor& like() const { return like_; }
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  void* take(int64_t count, DType dtype) {
    return dtype == DType::kFloat32 ? take<float>(count) : static_cast<void*>(take<BFloat16>(count));
  }

  // What was taken may be given again, from one piece.
  void reset() {
    if (pieces_.size() > 1) {
      pieces_.clear();
      add_piece(std::exchange(total_, 0));
    }
    if (pieces_.empty()) return;
    free_ = write<char>(pieces_.front());
    left_ = total_;
  }

 private:
  void* take_bytes(int64_t size) {
    size = ceil_div(size, kAlignment) * kAlignment;
    if (size > left_) add_piece(std::max(size, least_));
    left_ -= size;
    return std::exchange(free_, free_ + size);
  }
  void add_piece(int64_t size) {
    pieces_.push_back(scratch(like_, {size}, ScalarType::Byte));
    free_ = write<char>(pieces_.back());
    left_ = size;
    total_ += size;
  }

  static constexpr int64_t kAlignment = 64;
  const Tensor& like_;
  std::vector<Tensor> pieces_;
  char* free_ = nullptr;
  int64_t least_, left_ = 0, total_ = 0;
};

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

// Of the rows that meet weights of this type in a CPU matrix product.
inline DType row_dtype(DType weight) {
  return multiplies_pairs() && weight == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
}

// x [T, K] as a CPU matrix product reads it: x itself where it already is so, otherwise a copy, with the rows in the
// order given (int32 [T], nullptr for their own).
inline const void* product_rows(const void* x, int64_t T, int64_t K, DType dtype, Workspace& workspace,
                                const int32_t* order = nullptr) {
  const int64_t stride = 2 * ceil_div(K, 2);
  if (dtype == row_dtype(dtype) && stride == K && !order) return x;
  const ArrangeRowsParams p{.x = x,
                            .order = order,
                            .out = workspace.take(T * stride, row_dtype(dtype)),
                            .T = T,
                            .K = K,
                            .stride = stride,
                            .dtype = dtype};
  run_tasks(cpu::arrange_rows, p, T, 16384 / std::max<int64_t>(1, K));
  return p.out;
}

}  // namespace blockdraft
