#pragma once
// Contract of block_attention: query rows over a paged prefix and over the rows of their own mask group.
//
// Row t sees the keys at positions [0, row_prefix[t]) of its sequence, in the pages, and the rows
// [row_group_begin[t], row_group_end[t]) of this call, which stand at positions row_prefix[t], row_prefix[t] + 1, ...
// A causal row sees its own key in the pages (row_prefix = position + 1, no group). Rows of a group see each other in
// both directions. With a sliding window W, a key is visible where its position > the row's position - W.
//
// Bits: keys are taken in blocks at absolute positions (CPU: 32, GPU: 128), blocks in chunks with sums of their own
// (512, 256), merged in order. All of it follows from the row's own prefix, so a row has the same bits alone and beside
// others.
//
// Index values out of range raise on the CPU. A GPU kernel cuts prefixes and groups to what exists, takes a page that
// does not exist for one of zeros, and gives zeros to a row that sees no key.
#include <cstdint>

#include "common/dtype.h"

namespace blockdraft {

struct AttentionTask {
  int32_t sequence;
  int32_t first_row, rows;         // neighbouring rows of one sequence with the same group
  int32_t head;                    // key-value head
  int32_t chunk;                   // of 512 absolute positions
  int32_t group_begin, group_end;  // rows of the group, empty for causal rows
};

struct BlockAttentionParams {
  const void* q;        // [T, Hq, D] of dtype
  const void* k;        // [T, Hkv, D] of dtype, read for mask groups
  const void* v;        // [T, Hkv, D] of dtype
  const void* k_pages;  // [N, Hkv, page_size / 32, ...] of dtype (cca_mix.h)
  const void* v_pages;
  const int32_t* page_table;       // [B, M]
  const int32_t* cu_rows;          // [B + 1]
  const int32_t* row_positions;    // [T]
  const int32_t* row_prefix;       // [T]
  const int32_t* row_group_begin;  // [T]
  const int32_t* row_group_end;    // [T]
  const AttentionTask* tasks;      // CPU: [tasks]
  const int32_t* row_chunks;       // CPU: [T + 1], offsets into the partial sums: chunks of the rows before
  float* partial;                  // scratch; CPU: [sum of chunks, Hq, D + 2]: sums, then maximum and denominator
  void* out;                       // [T, Hq, D] of dtype
  int64_t T, Hq, Hkv, D, B, M, N, page_size, sliding_window;  // sliding_window 0: none
  float softmax_scale;
  DType dtype;
};

inline constexpr int64_t kAttentionTile = 32;    // keys of a block
inline constexpr int64_t kAttentionChunk = 512;  // keys of a chunk
inline constexpr int64_t kAttentionRows = 16;    // rows of a task

namespace cpu {
// Tasks [begin, end).
void block_attention(const BlockAttentionParams& p, int64_t begin, int64_t end);
// Rows [begin, end): merges the chunks.
void block_attention_merge(const BlockAttentionParams& p, int64_t begin, int64_t end);
}  // namespace cpu

namespace gpu {
// Floats of the scratch `partial`; follows from shapes and dtype.
int64_t block_attention_partial_size(const BlockAttentionParams& p);
const char* block_attention(const BlockAttentionParams& p, void* stream);
}  // namespace gpu

}  // namespace blockdraft
