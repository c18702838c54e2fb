#pragma once
// Contract of pack_weight: the order in which kernels stream a weight matrix.
//
// Panels of 32 outputs, two neighbouring k at a time, on every device (csrc/cpu/gemm.h, csrc/gpu/device/panel.cuh):
//   packed[e][p][k / 2][..] = weight[e][row(p, c)][k], 32 c; inner order [32][2] in bfloat16, int8 and Float8, [2][32]
//   in float32.
// Mxfp4 has four pairs together, [32][2] words of 16 bits, the first pair in the low bits: a GPU's lane loads four
// outputs of eight k in 16 bytes, and one table lookup by 16-bit words gives a CPU 16 outputs of a pair.
// With halves = 2 the matrix is two stacked ones (gate above up): panel 2i holds rows 32i.. of the first, panel 2i + 1
// those of the second, so that a SwiGLU finds both beside each other. Missing rows and an odd last k are zeros.
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

struct PackWeightParams {
  const void* weight;  // [E, N, K] of dtype; kMxfp4: two k a byte, and K is whole blocks
  void* packed;        // [E, panels, pairs, 64] of dtype
  int64_t E, N, K, halves, panels, pairs;
  DType dtype;
};

namespace cpu {
// Panels [begin, end) of E * panels.
void pack_weight(const PackWeightParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* pack_weight(const PackWeightParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
