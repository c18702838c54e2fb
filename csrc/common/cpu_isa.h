#pragma once
// Which instruction set the CPU kernels use. BLOCKDRAFT_CPU_ISA=base, avx2 or avx512 lowers the choice, for tests and
// comparisons, and never raises it above what the machine has.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace blockdraft {

enum class CpuIsa { kBase, kAvx2, kAvx512 };
inline constexpr const char* kCpuIsaNames[] = {"base", "avx2", "avx512"};

inline CpuIsa detect_cpu_isa() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("x86-64-v4")) return CpuIsa::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kBase;
}

inline CpuIsa choose_cpu_isa() {
  const CpuIsa best = detect_cpu_isa();
  const char* wanted = std::getenv("BLOCKDRAFT_CPU_ISA");
  if (!wanted || !*wanted) return best;
  for (CpuIsa isa : {CpuIsa::kBase, CpuIsa::kAvx2, CpuIsa::kAvx512})
    if (std::string_view(wanted) == kCpuIsaNames[static_cast<int>(isa)]) return isa < best ? isa : best;
  throw std::runtime_error("BLOCKDRAFT_CPU_ISA must be base, avx2 or avx512, got " + std::string(wanted));
}

// The environment is read at the first call only.
inline CpuIsa cpu_isa() {
  static const CpuIsa isa = choose_cpu_isa();
  return isa;
}

}  // namespace blockdraft
