#include "ops/commit_states.h"

#include "cpu/simd.h"

namespace blockdraft::cpu::BLOCKDRAFT_ISA {
namespace {

template <class T>
void commit(const CommitStatesParams& p, int64_t layer, int64_t b) {
  const int64_t row = p.commit_rows[b];
  if (row < 0) return;
  const T* qkv = static_cast<const T*>(p.qkv) + layer * p.T * p.width;
  T* conv = static_cast<T*>(p.conv_states) + (layer * p.S + p.state_slots[b]) * 2 * p.C;
  T* recurrent = static_cast<T*>(p.recurrent_states) + (layer * p.S + p.state_slots[b]) * p.delayed;
  const int64_t parent = p.row_parents[row];
  __builtin_memmove(conv, parent < 0 ? conv + p.C : qkv + parent * p.width, p.C * sizeof(T));
  __builtin_memcpy(conv + p.C, qkv + row * p.width, p.C * sizeof(T));
  __builtin_memcpy(recurrent, qkv + row * p.width + p.C + p.delayed, p.delayed * sizeof(T));
}

}  // namespace

void commit_states(const CommitStatesParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.dtype == DType::kBFloat16)
      commit<BFloat16>(p, i / p.B, i % p.B);
    else
      commit<float>(p, i / p.B, i % p.B);
  }
}

}  // namespace blockdraft::cpu::BLOCKDRAFT_ISA
