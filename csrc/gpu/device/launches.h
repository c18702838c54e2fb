#pragma once
// How many kernels this library has launched. A graph counts when it is captured, not when it is replayed.
#include <atomic>
#include <cstdint>

namespace blockdraft::gpu {

inline std::atomic<int64_t> launched = 0;

}  // namespace blockdraft::gpu

extern "C" __attribute__((visibility("default"))) int64_t blockdraft_launches();
