#include "blocks.h"

#include <algorithm>
#include <utility>

namespace alignops::attention::store {

PageList::PageList(std::span<const int64_t> pages, int64_t room)
    : entries_(new int64_t[pages.size() + static_cast<size_t>(room)]),
      size_(static_cast<int64_t>(pages.size())),
      capacity_(size_ + room) {
  std::copy(pages.begin(), pages.end(), entries_.get());
}

bool PageList::push(std::span<const int64_t> pages) {
  if (size_ + static_cast<int64_t>(pages.size()) > capacity_) return false;
  std::copy(pages.begin(), pages.end(), entries_.get() + size_);
  size_ += static_cast<int64_t>(pages.size());
  return true;
}

Run Run::part(int64_t from, int64_t to, int64_t page_size) const {
  Run out = *this;
  out.begin += (first + from) / page_size;
  out.first = (first + from) % page_size;
  out.n = to - from;
  out.s0 += from;
  out.r0 += from;
  return out;
}

int64_t Block::tokens() const {
  int64_t count = 0;
  for (const Run& run : runs) count += run.n;
  return count;
}

int64_t Block::pages(int64_t page_size) const {
  int64_t count = 0;
  for (const Run& run : runs) count += static_cast<int64_t>(run.pages(page_size).size());
  return count;
}

int64_t Block::partial_pages(int64_t page_size) const {
  int64_t count = 0;
  for (const Run& run : runs) {
    const int64_t end = run.first + run.n;
    const int64_t whole = end / page_size - (run.first + page_size - 1) / page_size;
    count += static_cast<int64_t>(run.pages(page_size).size()) - std::max<int64_t>(whole, 0);
  }
  if (runs.empty()) return 0;
  return count - ((runs.back().first + runs.back().n) % page_size > 0 ? 1 : 0);
}

void Block::append_pages(int64_t page_size, std::vector<int64_t>& out) const {
  for (const Run& run : runs) {
    const auto pages = run.pages(page_size);
    out.insert(out.end(), pages.begin(), pages.end());
  }
}

void evict(Block& block, int64_t start, int64_t stop, bool close_gap, int64_t page_size) {
  std::vector<Run> left;
  for (const Run& run : block.runs) {
    const int64_t from = std::clamp(start - run.s0, int64_t{0}, run.n);
    const int64_t to = std::clamp(stop - run.s0, int64_t{0}, run.n);
    if (from > 0) left.push_back(run.part(0, from, page_size));
    if (to == run.n) continue;
    left.push_back(run.part(std::max(from, to), run.n, page_size));
    if (run.end() > stop && close_gap) left.back().s0 -= stop - start;
  }
  block.runs = std::move(left);
  if (close_gap) block.extent -= stop - start;
}

void splice(Block& to, const Block& from) {
  for (const Run& run : from.runs) {
    to.runs.push_back(run);
    to.runs.back().s0 += to.extent;
  }
  to.extent += from.extent;
}

void append_run(Block& block, std::shared_ptr<PageList> list, int64_t first, int64_t rows) {
  block.runs.push_back({.list = std::move(list),
                        .begin = 0,
                        .first = first,
                        .n = rows,
                        .s0 = block.extent,
                        .r0 = block.extent});
  block.extent += rows;
}

std::shared_ptr<PageList> own_list(const Run& run, int64_t dropped, std::span<const int64_t> pages,
                                   int64_t page_size) {
  auto kept = run.pages(page_size);
  kept = kept.first(kept.size() - static_cast<size_t>(dropped));
  // As much room again as there is, so that a growing list moves seldom.
  const auto size = static_cast<int64_t>(kept.size() + pages.size());
  auto list = std::make_shared<PageList>(kept, size + kListRoom);
  list->push(pages);
  return list;
}

void extend_last(Block& block, std::span<const int64_t> pages, int64_t rows, int64_t page_size) {
  Run& last = block.runs.back();
  const auto count = static_cast<int64_t>(last.pages(page_size).size());
  if (!pages.empty() && (last.list->size() != last.begin + count || !last.list->push(pages))) {
    last.list = own_list(last, 0, pages, page_size);
    last.begin = 0;
  }
  last.n += rows;
  block.extent += rows;
}

}  // namespace alignops::attention::store
