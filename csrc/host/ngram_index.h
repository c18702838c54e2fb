#pragma once
// What followed the last time a text ended like this: the index behind blockdraft.ngram. No torch, no Python.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace blockdraft {

// The text of one sample, and for each n-gram of it, shortest <= n <= longest, where its latest occurrence ends. An
// entry names its n-gram by length and end in the text, so it takes 8 bytes whatever n is, and equality is exact.
class NgramIndex {
 public:
  NgramIndex(int longest, int shortest) : longest_(longest), shortest_(shortest), slots_(16) {}

  // Adds a token; returns how much spoke for a guess of it (0: nothing was guessed), and whether that guess held.
  std::pair<int64_t, bool> follow(int32_t token) {
    const int64_t foreseen = matched_;
    const bool held = foreseen > 0 && tokens_[next_] == token;
    if (tokens_.size() >= std::numeric_limits<uint32_t>::max()) throw std::length_error("NgramIndex: text too long");
    tokens_.push_back(token);
    matched_ = std::max<int64_t>(note(size()), held ? foreseen + 1 : 0);
    return {foreseen, held};
  }

  void extend(const std::vector<int32_t>& tokens) {
    for (int32_t token : tokens) follow(token);
  }

  // Up to `count` tokens after the occurrence that was found.
  std::vector<int32_t> draft(int64_t count) const {
    if (matched_ == 0) return {};
    const auto first = tokens_.begin() + next_;
    return {first, first + std::min<int64_t>(count, size() - next_)};
  }

  int64_t matched() const { return matched_; }
  int64_t entries() const { return entries_; }
  int64_t bytes() const { return tokens_.capacity() * sizeof(int32_t) + slots_.capacity() * sizeof(Slot); }

 private:
  struct Slot {
    uint32_t end = 0, n = 0;  // the n tokens before position `end`; n = 0: free
  };

  uint32_t size() const { return static_cast<uint32_t>(tokens_.size()); }

  // Hashes grow backwards, by the token before an n-gram: all endings of a text are hashed in one walk.
  static uint64_t longer(uint64_t hash, int32_t token) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0x9e3779b97f4a7c15u;
    return hash ^ (hash >> 32);
  }

  uint64_t hash(Slot gram) const {
    uint64_t hash = 0;
    for (uint32_t i = 1; i <= gram.n; ++i) hash = longer(hash, tokens_[gram.end - i]);
    return hash;
  }

  bool same(Slot a, Slot b) const {
    const auto end = tokens_.begin();
    return a.n == b.n && std::equal(end + a.end - a.n, end + a.end, end + b.end - b.n);
  }

  // The slot of an n-gram, or the free one where it belongs.
  Slot& find(uint64_t hash, Slot gram) {
    const size_t mask = slots_.size() - 1;
    size_t i = hash & mask;
    while (slots_[i].n != 0 && !same(slots_[i], gram)) i = (i + 1) & mask;
    return slots_[i];
  }

  // Sets the end of an n-gram's latest occurrence; returns that of the one before, 0 where it is new.
  uint32_t put(uint64_t hash, Slot gram) {
    if (2 * (entries_ + 1) > static_cast<int64_t>(slots_.size())) grow();
    Slot& slot = find(hash, gram);
    const uint32_t before = slot.end;
    entries_ += slot.n == 0;
    slot = gram;
    return before;
  }

  void grow() {
    const std::vector<Slot> old = std::exchange(slots_, std::vector<Slot>(2 * slots_.size()));
    for (const Slot& gram : old)
      if (gram.n != 0) find(hash(gram), gram) = gram;
  }

  // Notes the n-grams before position `end`, and what followed the longest that is not new; returns its length.
  //
  // A longer n-gram is noted once the shorter one that it ends with has occurred twice. Until then both have one
  // occurrence and the same answer; from then on the first occurrence's longer n-gram is noted too.
  int64_t note(uint32_t end) {
    int64_t length = 0;
    uint64_t hash = 0;
    for (uint32_t n = 1; n <= std::min(longest_, end); ++n) {
      hash = longer(hash, tokens_[end - n]);
      if (n < shortest_) continue;
      const uint32_t earlier = put(hash, {end, n});
      if (earlier == 0) break;
      length = n;
      next_ = earlier;
      if (n < std::min(longest_, earlier)) put(longer(hash, tokens_[earlier - n - 1]), {earlier, n + 1});
    }
    return length;
  }

  uint32_t longest_, shortest_;
  std::vector<int32_t> tokens_;
  std::vector<Slot> slots_;  // a power of two, at most half of them taken
  int64_t entries_ = 0, matched_ = 0;
  uint32_t next_ = 0;  // position of what followed the ending's earlier occurrence
};

}  // namespace blockdraft
