// A step: who appends how many tokens to which block, what everybody sees meanwhile, and the plan
// of it (plan.h) that kernels read.
//
// All memory of a step is kept for the next one: begin, write and commit allocate nothing once a
// step of that size has been made.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "blocks.h"
#include "epochs.h"
#include "plan.h"

namespace alignops::attention::store {

struct Layout;
struct Worker;

// How queries and keys arrive, and the frequencies of every rope type.
struct Form {
  bool local = false;  // rotated by their storage index
  std::vector<std::vector<double>> omegas;
};

struct Request {
  std::span<const int64_t> counts;  // new tokens of each entry
  // Who the entries are; null: with `views` nobody, else all active workers in order.
  const std::vector<int64_t>* workers = nullptr;
  // Blocks that each entry sees, the last of which it writes; null: the views of the workers.
  const std::vector<std::vector<int64_t>>* views = nullptr;
  // Other blocks are seen as they are now, without the tokens of this step.
  bool lagged = false;
  // Of the block that it writes an entry sees nothing but its new tokens.
  bool implicit_self = false;
};

// Tokens that a step appends to a block. They lie behind each other in a sequence of pages: the
// last one of the block, if slots of it could be claimed, and new ones.
struct Write {
  int64_t block;
  const Block* base;
  int64_t rows;
  bool extend;            // the last segment goes on; otherwise a new one begins
  bool copy;              // the last page is shared: what the segment has there moves to a new page
  int64_t tail;           // the last page; -1: not used
  int64_t end;            // slots of it before the new tokens
  int64_t claimed;        // new tokens in it
  int64_t pages, count;   // new pages: a range of Step::pages
  int64_t first() const;  // slot of the first new token in the first page of the sequence
};

struct Entry {
  int64_t worker;  // -1: nobody
  int64_t rows, row;
  int64_t view, blocks;  // a range of Step::views
  int64_t write;         // -1: no rows
  int64_t n0;            // extent of the written block before
};

class Step {
 public:
  explicit Step(Epochs& epochs) : pin(epochs) {}

  int64_t rows() const { return row_count; }
  int64_t words() const { return word_count; }
  // Of an entry's first new token, in its view.
  int64_t position(size_t entry) const { return own_origins_[entry] + entries[entry].n0; }
  // The plan: words() words.
  void fill(const Form& form, int64_t page_size, int64_t* out) const;

  // Set by Workspace::begin.
  Epochs::Pin pin;
  bool open = false, lagged = false, implicit_self = false;
  const Layout* layout = nullptr;
  std::vector<Entry> entries;
  std::vector<int64_t> views;
  std::vector<Write> writes;
  std::vector<int64_t> pages;   // new ones
  std::vector<int64_t> blocks;  // all that some entry has in its view: columns of the mass
  std::vector<int64_t> scratch;
  int64_t row_count = 0, word_count = 0;

  // Called by Workspace::begin when all of that is known.
  void tabulate(const Form& form, int64_t page_size);
  // Page of each new token's slot.
  int64_t slot(const Write& write, int64_t t, int64_t page_size) const;
  // Where the old tokens of a shared last page go: (from, to, count) in slots.
  struct PageCopy {
    int64_t src, dst, count;
  };
  PageCopy page_copy(const Write& write, int64_t page_size) const;

 private:
  struct Place {  // of a block in the view of an entry
    bool seen;
    float bias, gain;
    int64_t origin;
  };
  struct Keys {  // those of one segment
    int64_t column;
    int64_t n, old;  // `old` of them were there before the step
    int64_t page, first, s0, r0;
  };
  void place_blocks();
  void tabulate_block(int64_t column, bool local, int64_t page_size);
  void add_segment(const Keys& keys, bool local);

  std::vector<Place> places_;         // (blocks, entries)
  std::vector<int64_t> own_origins_;  // of each entry
  std::vector<int64_t> columns_;      // of each block number; -1: in no view
  std::vector<int64_t> writers_;      // of each column: the entry that appends to it, or -1
  // Tables of the plan.
  std::vector<Segment> segments_;
  std::vector<Pair> pairs_;
  std::vector<Weight> weights_;
  std::vector<int64_t> page_table_;
  int64_t longest_ = 0, tokens_ = 0;
};

}  // namespace alignops::attention::store
