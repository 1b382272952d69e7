// Pages of keys and values: who uses them, how far they are filled, which token is in which slot.
// What is stored in them is none of its business: page i is page i of every layer.
//
// A page has one reference per entry in the page lists of current blocks. Without references it is
// free as soon as no reader can see it (epochs.h).
//
// Slots are filled in order and what has been published stays as it is, so whoever ends where a
// page is filled to may go on there, also where others share the slots before: the first to come
// takes the rest of the page, and the others copy it.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "epochs.h"

namespace alignops::attention::store {

inline constexpr int64_t kNoToken = -1;

// All functions are safe to call from several threads. Slot s of page p is number p * page_size +
// s.
class PagePool {
 public:
  PagePool(int64_t pages, int64_t page_size);

  int64_t pages() const { return static_cast<int64_t>(refs_.size()); }
  int64_t page_size() const { return page_size_; }
  int64_t free_pages();
  // Pages with references, and those of them with more than one.
  struct Usage {
    int64_t used, shared;
  };
  Usage usage();
  Epochs& epochs() { return epochs_; }

  // Appends `count` empty pages to `out`, with one reference each. Throws PoolExhausted, naming
  // `op`, before anything is taken.
  void take(int64_t count, std::vector<int64_t>& out, const char* op);
  void retain(std::span<const int64_t> pages);
  // To be called after the layout without these references has been published.
  void release(std::span<const int64_t> pages);

  // Reserves slots [end, end + count) of a page for the holder of the slots before `end`; false if
  // somebody else may see something there.
  bool claim(int64_t page, int64_t end, int64_t count);
  // Gives them back, unused.
  void unclaim(int64_t page, int64_t end, int64_t count);

  // Which token is in a slot. Written by whoever has reserved the slot, before it is published.
  int64_t& token(int64_t slot) { return tokens_[static_cast<size_t>(slot)]; }

  // For tests: references of all pages, and how many are neither referenced nor free.
  std::vector<int64_t> references();
  int64_t waiting();

 private:
  void reclaim();  // under the mutex

  const int64_t page_size_;
  Epochs epochs_;
  std::mutex mutex_;
  std::vector<int64_t> refs_;
  std::vector<int64_t> filled_;         // slots of the page that have ever been reserved
  std::vector<Epochs::Time> released_;  // when it last lost a reference
  std::vector<int64_t> free_;
  // Pages without references that somebody may see, in the order of their times: a ring.
  std::vector<int64_t> limbo_;
  int64_t limbo_begin_ = 0, limbo_size_ = 0;
  std::vector<int64_t> tokens_;
};

}  // namespace alignops::attention::store
