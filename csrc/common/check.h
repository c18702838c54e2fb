#pragma once
// Argument checks of the host functions. One format for every message: operator, argument, wanted, got.
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/dtype.h"

namespace blockdraft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Not STD_TORCH_CHECK, which puts the function and the path of the source file in front of the message.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A size known by its letter: takes its value from the first tensor that has it, and every later one must agree.
struct Dim {
  const char* name;
  int64_t size = -1;
  operator int64_t() const { return size; }
};

// The checks run on every call, so no text is made before one fails: with seven tensors it cost 3 us of 9.
class Checker {
 public:
  // All tensors must lie on the device of `first`.
  Checker(const char* op, const Tensor& first) : op_(op), device_(first.device()) {}

  void tensor(const Tensor& t, const char* name, std::initializer_list<Dim*> dims,
              std::initializer_list<ScalarType> dtypes) const {
    check(t.device() == device_, op_, ": ", name, " must be on the device of the first argument");
    if (!bind(t, dims)) fail_shape(t, name, dims);
    if (std::find(dtypes.begin(), dtypes.end(), t.scalar_type()) == dtypes.end()) fail_dtype(t, name, dtypes);
    check(t.is_contiguous(), op_, ": ", name, " must be contiguous");
  }

  // A size that must have one value: wanted and got are in the message.
  void size(const char* name, int64_t got, int64_t wanted) const {
    check(got == wanted, op_, ": ", name, " must be ", wanted, ", got ", got);
  }

 private:
  static bool bind(const Tensor& t, std::initializer_list<Dim*> dims) {
    const auto sizes = t.sizes();
    if (sizes.size() != dims.size()) return false;
    auto size = sizes.begin();
    for (Dim* dim : dims) {
      if (dim->size < 0) dim->size = *size;
      if (dim->size != *size++) return false;
    }
    return true;
  }

  [[noreturn]] void fail_shape(const Tensor& t, const char* name, std::initializer_list<Dim*> dims) const {
    std::ostringstream message;
    message << op_ << ": " << name << " must be [";
    const char* comma = "";
    for (const Dim* dim : dims) {
      message << std::exchange(comma, ", ") << dim->name;
      if (dim->size >= 0) message << '=' << dim->size;
    }
    message << "], got [";
    comma = "";
    for (int64_t size : t.sizes()) message << std::exchange(comma, ", ") << size;
    throw std::runtime_error(message.str() + "]");
  }

  [[noreturn]] void fail_dtype(const Tensor& t, const char* name, std::initializer_list<ScalarType> dtypes) const {
    std::ostringstream message;
    message << op_ << ": " << name << " must be ";
    const char* alternative = "";
    for (ScalarType dtype : dtypes) message << std::exchange(alternative, " or ") << torch::headeronly::toString(dtype);
    message << ", got " << torch::headeronly::toString(t.scalar_type());
    throw std::runtime_error(message.str());
  }

  const char* op_;
  torch::stable::Device device_;
};

// For a tensor whose dtype was checked to be one of these.
inline DType to_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Char) return DType::kInt8;
  if (dtype == ScalarType::Float8_e4m3fn) return DType::kFloat8;
  if (dtype == ScalarType::Byte) return DType::kMxfp4;
  return dtype == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat32;
}

}  // namespace blockdraft
