#include "pages.h"

#include <algorithm>

#include "../common/check.h"
#include "errors.h"

namespace alignops::attention::store {

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

}  // namespace

PagePool::PagePool(int64_t pages, int64_t page_size) : page_size_(page_size) {
  ALIGNOPS_CHECK(page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128,
                 "KVPool: page_size must be 16, 32, 64 or 128, got ", page_size);
  ALIGNOPS_CHECK(pages > 0 && pages <= INT32_MAX, "KVPool: num_pages must be from 1 to ", INT32_MAX,
                 ", got ", pages);
  refs_.resize(at(pages));
  filled_.resize(at(pages));
  released_.resize(at(pages));
  limbo_.resize(at(pages));
  tokens_.resize(at(pages * page_size), kNoToken);
  free_.reserve(at(pages));
  for (int64_t page = pages; page-- > 0;) free_.push_back(page);
}

int64_t PagePool::free_pages() {
  const std::lock_guard lock(mutex_);
  reclaim();
  return static_cast<int64_t>(free_.size());
}

PagePool::Usage PagePool::usage() {
  const std::lock_guard lock(mutex_);
  Usage usage{0, 0};
  for (const int64_t refs : refs_) {
    usage.used += refs > 0;
    usage.shared += refs > 1;
  }
  return usage;
}

void PagePool::take(int64_t count, std::vector<int64_t>& out, const char* op) {
  if (count == 0) return;
  const std::lock_guard lock(mutex_);
  if (static_cast<int64_t>(free_.size()) < count) reclaim();
  if (static_cast<int64_t>(free_.size()) < count)
    throw PoolExhausted(message(op, ": needs ", count, " free pages of ", page_size_,
                                " tokens, got ", free_.size(), " of ", pages(), " (", limbo_size_,
                                " more are in use by open plans)"));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t page = free_.back();
    free_.pop_back();
    refs_[at(page)] = 1;
    filled_[at(page)] = 0;
    out.push_back(page);
  }
}

void PagePool::retain(std::span<const int64_t> pages) {
  const std::lock_guard lock(mutex_);
  for (const int64_t page : pages) ++refs_[at(page)];
}

void PagePool::release(std::span<const int64_t> pages) {
  if (pages.empty()) return;
  const std::lock_guard lock(mutex_);
  const Epochs::Time time = epochs_.advance();
  for (const int64_t page : pages) {
    released_[at(page)] = time;
    if (--refs_[at(page)] > 0) continue;
    limbo_[at((limbo_begin_ + limbo_size_++) % this->pages())] = page;
  }
  reclaim();
}

void PagePool::reclaim() {
  if (limbo_size_ == 0) return;
  const Epochs::Time oldest = epochs_.oldest();
  while (limbo_size_ > 0) {
    const int64_t page = limbo_[at(limbo_begin_)];
    if (released_[at(page)] >= oldest) return;
    free_.push_back(page);
    limbo_begin_ = (limbo_begin_ + 1) % pages();
    --limbo_size_;
  }
}

bool PagePool::claim(int64_t page, int64_t end, int64_t count) {
  const std::lock_guard lock(mutex_);
  int64_t& filled = filled_[at(page)];
  // What lies behind was given up by its last holder, and no reader remembers it.
  if (filled > end && refs_[at(page)] == 1 && released_[at(page)] < epochs_.oldest()) filled = end;
  if (filled != end) return false;
  filled = end + count;
  return true;
}

void PagePool::unclaim(int64_t page, int64_t end, int64_t count) {
  const std::lock_guard lock(mutex_);
  if (filled_[at(page)] == end + count) filled_[at(page)] = end;
}

std::vector<int64_t> PagePool::references() {
  const std::lock_guard lock(mutex_);
  return refs_;
}

int64_t PagePool::waiting() {
  const std::lock_guard lock(mutex_);
  reclaim();
  return limbo_size_;
}

}  // namespace alignops::attention::store
