#pragma once
// What follows a kernel's work on some rows, done by the last of its blocks that arrives, in place of another launch.
// Nobody waits, so that no number of blocks can be too many; and whoever comes last, it does the same: no bit depends
// on the order of arrival.
#include "gpu/device/compat.h"

namespace blockdraft::gpu {

// Whether the calling block is the last: the amounts of all that arrive at a counter sum up to `total`, each above 0.
// What the others wrote before is there for it to read. The counter is 0 before the first and after the last, so that
// the next launch may use it. All threads of the block; `shared`: memory of the block that nobody uses any more, in
// which a flag lies, for four bytes more would cost some kernels their second block on an AMD CU.
__device__ inline bool is_last(int32_t* counter, int amount, int total, void* shared) {
  int* last = static_cast<int*>(shared);
  __threadfence();
  __syncthreads();  // all that this block wrote comes before its arrival
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(counter, amount) + amount == total;
    if (*last) *counter = 0;
  }
  __syncthreads();
  const bool goes_on = *last;
  __threadfence();
  __syncthreads();  // the flag's memory is the caller's again
  return goes_on;
}

}  // namespace blockdraft::gpu
