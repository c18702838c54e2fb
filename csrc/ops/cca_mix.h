#pragma once
// Contract of cca_mix: from the joint projection of a row to its query, key and value (CCA, arXiv 2510.04476).
//
// A row has a parent, the row of the preceding token in this call, or -1: the committed state of its sequence. With
// u = [q | k] of a row, u' of its parent, u'' of the parent's parent:
//
//   m  = w0[:, 0] * u'  + w0[:, 1] * u  + b0          m' = w0[:, 0] * u'' + w0[:, 1] * u' + b0
//   y  = W1[.., 0] m' + W1[.., 1] m + b1              one D x D block per head and tap
//   mq = (q + k of its group) / 2                     mk = mean of mq over the heads of the group
//   Q  = rope(sqrt(D) * (y_q + mq) / |y_q + mq|)      K  = rope(sqrt(D) * temp * (y_k + mk) / |y_k + mk|)
//   V  = [v_current of the row ; v_delayed of its parent]
//
// One operator for prefill, decoding, verification, mask groups and packed sequences: they differ in parents alone.
// u and v_delayed are in the storage type before any use, so a fresh and a cached row are equal.
//
// Indices out of range raise on the CPU. A GPU kernel takes such a parent for -1, such a state for zeros, and leaves
// the key of such a slot out of the pages.
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

struct CcaMixParams {
  const void* qkv;             // [T, C + Hkv * D] of dtype: q heads, k heads, v_current, v_delayed; C = (Hq + Hkv) * D
  const int32_t* row_parents;  // [T], -1 or a row of the same sequence
  const int32_t* row_positions;      // [T], absolute
  const int32_t* row_states;         // [T], slot of the row's sequence in the states
  const int64_t* row_slots;          // [T], key slot page * page_size + offset, or -1: k and v stay in k and v below
  const void* conv_states;           // [S, 2, C] of dtype, older first
  const void* recurrent_states;      // [S, Hkv * D / 2] of dtype
  const float* conv_qk_depthwise;    // [2, C]
  const float* conv_depthwise_bias;  // [C]
  const void* conv_qk_grouped;       // packed [Hq + Hkv, panels, D, 64] of dtype: N = D, K = 2 * D, tap 0 first
  const float* conv_grouped_bias;    // [C]
  const float* temp;                 // [Hkv]
  const float* inverse_frequencies;  // [rotary / 2]
  float* rotary;                     // CPU: scratch [T, 2, rotary / 2]: cosines, sines
  float* mixed;                      // CPU: scratch [Hq + Hkv, T, 2 * D]: m' and m of a head
  void* q;                           // [T, Hq, D] of dtype
  void* k;                           // [T, Hkv, D] of dtype
  void* v;                           // [T, Hkv, D] of dtype
  void* k_pages;                     // [N, Hkv, page_size / 32, D / 2 * 64]: 32 keys as the outputs of a panel
  void* v_pages;                     // [N, Hkv, page_size / 32, ceil(D / 32) * 16 * 64]: D as outputs, keys as k
  int64_t T, Hq, Hkv, D, S, N, half_rotary, page_size;
  DType dtype;
};

namespace cpu {
// Rows [begin, end): cosines and sines.
void cca_mix_rotary(const CcaMixParams& p, int64_t begin, int64_t end);
// (head, block of 16 rows) tasks [begin, end) of (Hq + Hkv) * ceil(T / 16): Q and K.
void cca_mix(const CcaMixParams& p, int64_t begin, int64_t end);
// Rows [begin, end): V, then k and v into the pages.
void cca_mix_store(const CcaMixParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* cca_mix(const CcaMixParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
