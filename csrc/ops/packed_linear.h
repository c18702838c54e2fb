#pragma once
// Contract of packed_linear: out = x weight^T with a packed weight and float32 sums. A row's bits depend on its own
// values and the weight alone.
#include <cstdint>

#include "common/arrivals.h"
#include "common/dtype.h"
#include "ops/residual_norm.h"

namespace blockdraft {

struct PackedLinearParams {
  const void* x;       // [T, K] of dtype
  const void* rows;    // CPU: x [T, 2 * pairs] as products read it (ArrangeRowsParams)
  const void* packed;  // [panels, pairs, 64] of dtype
  void* out;           // [T, N] of dtype, float32 where out_float32
  int64_t T, N, K, panels, pairs;
  DType dtype;
  bool out_float32;
};

// Rows of dtype to rows as the CPU's matrix products read them: zero from K on, and float32, or bfloat16 where the
// instruction set multiplies pairs of it (common/cpu_isa.h).
struct ArrangeRowsParams {
  const void* x;         // [T, K] of dtype
  const int32_t* order;  // [T], source row of each output row; nullptr for the identity
  void* out;             // [T, stride]
  int64_t T, K, stride;
  DType dtype;
};

namespace cpu {
// Rows [begin, end) of out.
void arrange_rows(const ArrangeRowsParams& p, int64_t begin, int64_t end);
// Panels [begin, end).
void packed_linear(const PackedLinearParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* packed_linear(const PackedLinearParams& p, void* stream);
// And the norm of out, which is norm.hidden_states and of dtype, in one launch, with the bits of two. Up to
// kMostJoinedRows rows; arrivals: [kArrivals].
const char* packed_linear_norm(const PackedLinearParams& p, const ResidualNormParams& norm, int32_t* arrivals,
                               void* stream);
}  // namespace gpu

}  // namespace blockdraft
