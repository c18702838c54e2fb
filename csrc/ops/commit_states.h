#pragma once
// Contract of commit_states: the CCA state of every layer after the last committed row of each sequence.
//
//   conv_states[l, s]      = u of the row's parent, u of the row     (a parent of -1: the newer of the old columns)
//   recurrent_states[l, s] = v_delayed of the row
//
// A convolution's state is a slice of its past inputs, so committing is a gather and rolling back is doing nothing. A
// commit row of -1 leaves its sequence untouched; on a GPU, where the host does not look at values, so does an index
// that is out of range.
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

struct CommitStatesParams {
  const void* qkv;             // [L, T, C + Hkv * D] of dtype, as cca_mix read it; width = C + Hkv * D
  const int32_t* row_parents;  // [T]
  const int32_t* commit_rows;  // [B]
  const int32_t* state_slots;  // [B]
  void* conv_states;           // [L, S, 2, C] of dtype
  void* recurrent_states;      // [L, S, delayed] of dtype
  int64_t L, T, B, S, C, width, delayed;
  DType dtype;
};

namespace cpu {
// (layer, sequence) pairs [begin, end) of L * B.
void commit_states(const CommitStatesParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
const char* commit_states(const CommitStatesParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
