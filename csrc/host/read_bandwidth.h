#pragma once
// How fast all threads together can read memory: the bound of a decoding step, and what `blockdraft bench` compares
// with. Knows neither torch nor Python.
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace blockdraft {

inline constexpr int64_t kReadStep = 512;  // bytes: eight accumulators of the widest registers, so that adds never wait

// Sums of the 64-bit words of [p, p + bytes); bytes is a multiple of kReadStep. This file is compiled for the baseline,
// whose 16-byte loads leave a core short of its share of the memory bandwidth, hence the versions.
inline uint64_t sum_words_base(const uint64_t* p, int64_t bytes) {
  uint64_t sums[16] = {};
  for (int64_t i = 0; i < bytes / 8; i += 16)
    for (int j = 0; j < 16; ++j) sums[j] += p[i + j];
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

#ifdef __x86_64__
__attribute__((target("avx2"))) inline uint64_t sum_words_avx2(const uint64_t* p, int64_t bytes) {
  __m256i sums[8] = {};
  for (int64_t i = 0; i < bytes / 8; i += 32)
    for (int j = 0; j < 8; ++j)
      sums[j] = _mm256_add_epi64(sums[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i) + j));
  uint64_t total = 0, lanes[4];
  for (__m256i sum : sums) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
    for (uint64_t lane : lanes) total += lane;
  }
  return total;
}

__attribute__((target("avx512f"))) inline uint64_t sum_words_avx512(const uint64_t* p, int64_t bytes) {
  __m512i sums[8] = {};
  for (int64_t i = 0; i < bytes / 8; i += 64)
    for (int j = 0; j < 8; ++j) sums[j] = _mm512_add_epi64(sums[j], _mm512_load_si512(p + i + 8 * j));
  uint64_t total = 0, lanes[8];
  for (__m512i sum : sums) {
    _mm512_storeu_si512(lanes, sum);
    for (uint64_t lane : lanes) total += lane;
  }
  return total;
}
#endif

// What the machine has, and not cpu_isa(): the limit is the memory's, also where BLOCKDRAFT_CPU_ISA lowers the kernels.
inline uint64_t sum_words(const uint64_t* p, int64_t bytes) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return sum_words_avx512(p, bytes);
  if (__builtin_cpu_supports("avx2")) return sum_words_avx2(p, bytes);
#endif
  return sum_words_base(p, bytes);
}

// Anonymous memory on huge pages where the system grants them: with pages of 4 KB the walks of the page table cost up
// to a third of the bandwidth.
class HugeBuffer {
 public:
  explicit HugeBuffer(int64_t bytes) : mapped_(bytes + kPage) {
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t first = (reinterpret_cast<uintptr_t>(base_) + kPage - 1) / kPage * kPage;
    words_ = reinterpret_cast<uint64_t*>(first);
#ifdef MADV_HUGEPAGE
    madvise(words_, bytes, MADV_HUGEPAGE);  // a refusal costs speed only
#endif
  }
  ~HugeBuffer() { munmap(base_, mapped_); }
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;
  uint64_t* words() const { return words_; }

 private:
  static constexpr int64_t kPage = 2 << 20;
  void* base_;
  size_t mapped_;
  uint64_t* words_;
};

// The most bytes per second (in 1e9) of `repeats` passes over a buffer of about `bytes`, a share of it per thread. Each
// thread writes its share first, so that the pages lie on its own memory node.
inline double read_bandwidth(int64_t bytes, int threads, int repeats) {
  if (threads < 1 || threads > 1024 || repeats < 1 || bytes / threads < kReadStep)
    throw std::invalid_argument("read_bandwidth: wants 1 to 1024 threads, repeats >= 1, at least 512 bytes a thread");
  using Clock = std::chrono::steady_clock;
  const int64_t share = bytes / threads / kReadStep * kReadStep, words = share / 8;
  const HugeBuffer buffer(share * threads);
  std::vector<Clock::time_point> starts(threads), ends(threads);
  std::vector<int64_t> wrong(threads, 0);
  double best = 0;
  std::barrier<> ready(threads);
  const auto after_pass = [&] {
    const std::chrono::duration<double> time =
        *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
    best = std::max(best, share * threads / time.count() * 1e-9);
  };
  const auto work = [&](int id) {
    uint64_t* mine = buffer.words() + id * words;
    std::fill_n(mine, words, 1);
    for (int pass = 0; pass < repeats; ++pass) {
      ready.arrive_and_wait();
      starts[id] = Clock::now();
      wrong[id] += sum_words(mine, share) != static_cast<uint64_t>(words);
      ends[id] = Clock::now();
      ready.arrive_and_wait();
      if (id == 0) after_pass();
    }
  };
  std::vector<std::thread> others;
  for (int id = 1; id < threads; ++id) others.emplace_back(work, id);
  work(0);
  for (std::thread& thread : others) thread.join();
  if (std::count(wrong.begin(), wrong.end(), 0) != threads) throw std::runtime_error("read_bandwidth: a wrong sum");
  return best;
}

}  // namespace blockdraft
