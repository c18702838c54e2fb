#pragma once
// What the host functions share that have the arguments temperature, top_k, top_p and min_p.
#include <cmath>
#include <vector>

#include "common/host.h"

namespace blockdraft {

inline constexpr int64_t kLanes = 16, kSumIds = 512;  // csrc/cpu/simd.h, csrc/cpu/token_law.h

// Values no law exists for. Looked at on the CPU only.
template <class Params>
void check_laws(const char* op, const Params& p) {
  for (int64_t t = 0; t < p.T; ++t) {
    // Below 1e-6 a logit divided by it may leave float32.
    check(p.temperature[t] == 0 || (p.temperature[t] >= 1e-6f && std::isfinite(p.temperature[t])), op,
          ": temperature must be 0 or finite and at least 1e-06, got ", p.temperature[t], " at ", t);
    check(p.top_k[t] >= 0, op, ": top_k must be at least 0, got ", p.top_k[t], " at ", t);
    check(p.top_p[t] > 0 && p.top_p[t] <= 1, op, ": top_p must be in (0, 1], got ", p.top_p[t], " at ", t);
    check(p.min_p[t] >= 0 && p.min_p[t] <= 1, op, ": min_p must be in [0, 1], got ", p.min_p[t], " at ", t);
  }
}

// Rows of scratch for the rows that `needs` one, in order; -1 for the others.
struct ScratchRows {
  template <class Needs>
  ScratchRows(int64_t T, Needs needs) : rows(T, -1) {
    for (int64_t t = 0; t < T; ++t)
      if (needs(t)) rows[t] = count++;
  }
  std::vector<int32_t> rows;
  int32_t count = 0;
};

}  // namespace blockdraft
