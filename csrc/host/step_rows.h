#pragma once
// The rows of a step as columns: what blockdraft.steps hands to the operators. No torch, no Python.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace blockdraft {

// Columns in the making. A sequence's causal rows come first, then its groups, each of which follows one of them.
class StepRows {
 public:
  using Ints = std::vector<int32_t>;

  // chained: a row of a group follows the one before it, else all follow the group's causal row; detached: nothing, and
  // their state is that of `empty_slot`.
  StepRows(int32_t page_size, bool chained, bool detached, int32_t empty_slot)
      : page_size_(page_size), chained_(chained), detached_(detached), empty_slot_(empty_slot) {}

  // A sequence of `length` committed tokens, and its causal rows.
  void add(int32_t length, int32_t slot, Ints pages, const Ints& tokens) {
    const int32_t first = rows(), count = static_cast<int32_t>(tokens.size());
    for (int32_t i = 0; i < count; ++i) {
      const int32_t position = length + i;
      push(tokens[i], i == 0 ? -1 : first + i - 1, position, slot, position + 1, first, first);
      row_slots_.push_back(row_slot(pages, position));
    }
    length_ = length, slot_ = slot, first_causal_ = first;
    pages_.push_back(std::move(pages));
    state_slots_.push_back(slot);
    cu_rows_.push_back(rows());
  }

  // A group of the sequence added last, after its causal row of index `after`; -1: after the committed tokens.
  void add_group(int32_t after, const Ints& tokens, int32_t skip) {
    if (pages_.empty()) throw std::invalid_argument("make_step: wanted a sequence before its group");
    const int32_t first = rows(), count = static_cast<int32_t>(tokens.size()), seen = length_ + after + 1;
    const int32_t parent = after < 0 || detached_ ? -1 : first_causal_ + after;
    const int32_t state = detached_ ? empty_slot_ : slot_;
    for (int32_t i = 0; i < count; ++i) {
      push(tokens[i], i == 0 || !chained_ ? parent : first + i - 1, seen + skip + i, state, seen, first, first + count);
      row_slots_.push_back(-1);
    }
    cu_rows_.back() = rows();
  }

  // int64 row_slots, then int32 columns, one behind the other: tokens, parents, positions, states, prefix, group
  // begins, group ends, cu_rows, page table, state slots.
  std::string packed() const {
    const size_t bytes = sizeof(int64_t) * row_slots_.size() +
                         sizeof(int32_t) * (kColumns * columns_[0].size() + cu_rows_.size() +
                                            state_slots_.size() * static_cast<size_t>(width() + 1));
    std::string out(bytes, '\0');
    char* at = append(out.data(), row_slots_);
    for (const Ints& column : columns_) at = append(at, column);
    at = append(at, cu_rows_);
    for (const Ints& pages : pages_) append(at, pages), at += sizeof(int32_t) * static_cast<size_t>(width());
    append(at, state_slots_);
    return out;
  }

  int32_t rows() const { return static_cast<int32_t>(columns_[0].size()); }
  int32_t sequences() const { return static_cast<int32_t>(state_slots_.size()); }

  // Pages of the longest sequence.
  int32_t width() const {
    size_t most = 0;
    for (const Ints& pages : pages_) most = std::max(most, pages.size());
    return static_cast<int32_t>(most);
  }

 private:
  static constexpr int kColumns = 7;

  template <class... Values>
  void push(Values... values) {
    static_assert(sizeof...(values) == kColumns);
    Ints* column = columns_;
    (column++->push_back(values), ...);
  }

  int64_t row_slot(const Ints& pages, int32_t position) const {
    const size_t page = position / page_size_;
    if (page >= pages.size()) {
      throw std::out_of_range("make_step: wanted a page for position " + std::to_string(position) + ", got " +
                              std::to_string(pages.size()) + " pages of " + std::to_string(page_size_) + " tokens");
    }
    return int64_t{pages[page]} * page_size_ + position % page_size_;
  }

  template <class T>
  static char* append(char* at, const std::vector<T>& values) {
    if (!values.empty()) std::memcpy(at, values.data(), sizeof(T) * values.size());
    return at + sizeof(T) * values.size();
  }

  int32_t page_size_;
  bool chained_, detached_;
  int32_t empty_slot_;
  Ints columns_[kColumns], cu_rows_{0}, state_slots_;
  std::vector<int64_t> row_slots_;
  std::vector<Ints> pages_;
  int32_t length_ = 0, slot_ = 0, first_causal_ = 0;  // of the sequence added last
};

}  // namespace blockdraft
