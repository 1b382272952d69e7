// A block: tokens in runs. A run is a run of slots in consecutive entries of a page list,
// whose keys have consecutive positions in the block and consecutive rotations. Whatever happens to
// a block but appending is a new list of runs over the same pages.
//
// Positions of a block run from 0 to its extent. Evicted tokens may leave a gap: positions without
// a key, which later blocks of a view still count.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace alignops::attention::store {

// Entries that a new list takes before it has to move.
inline constexpr int64_t kListRoom = 32;

// Page numbers that are only ever added to, so that versions of a block share it: each reads the
// entries that it knows of. Adding is for one writer at a time.
class PageList {
 public:
  PageList(std::span<const int64_t> pages, int64_t room);

  const int64_t* data() const { return entries_.get(); }
  int64_t size() const { return size_; }
  // False if there is no room.
  bool push(std::span<const int64_t> pages);

 private:
  std::unique_ptr<int64_t[]> entries_;
  int64_t size_ = 0, capacity_;
};

struct Run {
  std::shared_ptr<PageList> list;
  int64_t begin = 0;  // first entry of the list
  int64_t first = 0;  // slot of key 0 in its page
  int64_t n = 0;
  int64_t s0 = 0;          // position of key 0
  int64_t r0 = 0;          // rotation of key 0
  bool rewritten = false;  // keys have been rotated again, which happens once at most

  bool in_phase() const { return r0 == s0; }
  int64_t end() const { return s0 + n; }
  std::span<const int64_t> pages(int64_t page_size) const {
    const int64_t count = (first + n + page_size - 1) / page_size;
    return {list->data() + begin, static_cast<size_t>(count)};
  }
  int64_t slot(int64_t i, int64_t page_size) const {
    const int64_t place = first + i;
    return list->data()[begin + place / page_size] * page_size + place % page_size;
  }
  // Keys [from, to).
  Run part(int64_t from, int64_t to, int64_t page_size) const;
};

// One version of a block: never changed once it is published.
struct Block {
  std::shared_ptr<const std::string> name;
  std::vector<Run> runs;  // n > 0, positions ascending
  int64_t extent = 0;

  int64_t tokens() const;
  // Entries of page lists whose page the run fills in part, not counting the very last.
  int64_t partial_pages(int64_t page_size) const;
  int64_t pages(int64_t page_size) const;  // entries of all runs
  void append_pages(int64_t page_size, std::vector<int64_t>& out) const;
};

// block becomes what it is without the tokens at positions [start, stop). close_gap: later ones
// move up.
void evict(Block& block, int64_t start, int64_t stop, bool close_gap, int64_t page_size);
// All runs of `from` follow those of `to`.
void splice(Block& to, const Block& from);
// The tokens at [begin, begin + rows) of a page sequence follow: `list` holds the pages from entry
// 0, `first` is the slot of the first.
void append_run(Block& block, std::shared_ptr<PageList> list, int64_t first, int64_t rows);
// `rows` tokens more in the last run, whose page list goes on with `pages`.
void extend_last(Block& block, std::span<const int64_t> pages, int64_t rows, int64_t page_size);
// The page list of a run in its own memory, with `dropped` entries less at its end and `pages`
// after them.
std::shared_ptr<PageList> own_list(const Run& run, int64_t dropped, std::span<const int64_t> pages,
                                   int64_t page_size);

}  // namespace alignops::attention::store
