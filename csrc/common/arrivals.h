#pragma once
// On a GPU a kernel may go on with what follows it, by the last of its blocks that arrives at a counter, where the rows
// are few: one block does for all of them what a launch would spread over many.
#include <cstdint>

namespace blockdraft {

inline constexpr int64_t kMostJoinedRows = 32;  // a block of 16 and a mask group
inline constexpr int64_t kArrivals = 1;         // counters that such a kernel uses, 0 before and after it

}  // namespace blockdraft
