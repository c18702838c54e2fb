#pragma once
// Which instruction set the CPU kernels use. BLOCKDRAFT_CPU_ISA=base, avx2, avx512 or avx512bf16 lowers the choice, for
// tests and comparisons, and never raises it above what the machine has.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace blockdraft {

enum class CpuIsa { kBase, kAvx2, kAvx512, kAvx512Bf16 };
inline constexpr const char* kCpuIsaNames[] = {"base", "avx2", "avx512", "avx512bf16"};

inline CpuIsa detect_cpu_isa() {
#ifdef __x86_64__
  // Intel's cores take two cycles for what is one multiply-add each cycle otherwise: there pairs would be half as fast.
  // AMD's with these pairs have byte permutations, too (Zen 4 on).
  if (__builtin_cpu_supports("x86-64-v4"))
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_is("amd")
               ? CpuIsa::kAvx512Bf16
               : CpuIsa::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kBase;
}

inline CpuIsa choose_cpu_isa() {
  const CpuIsa best = detect_cpu_isa();
  const char* wanted = std::getenv("BLOCKDRAFT_CPU_ISA");
  if (!wanted || !*wanted) return best;
  for (CpuIsa isa : {CpuIsa::kBase, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16})
    if (std::string_view(wanted) == kCpuIsaNames[static_cast<int>(isa)]) return isa < best ? isa : best;
  throw std::runtime_error("BLOCKDRAFT_CPU_ISA must be base, avx2, avx512 or avx512bf16, got " + std::string(wanted));
}

// The environment is read at the first call only.
inline CpuIsa cpu_isa() {
  static const CpuIsa isa = choose_cpu_isa();
  return isa;
}

// Whether products take rows of bfloat16 as they are, a pair of k at a time, and not widened to float32.
inline bool multiplies_pairs() { return cpu_isa() == CpuIsa::kAvx512Bf16; }

}  // namespace blockdraft
