// A workspace: blocks of tokens over a shared page pool, workers that each see some of them in an
// order of their own, steps that append to several blocks at once, and changes of the layout.
//
// What readers see is one immutable Layout. It is replaced under a mutex and published by storing a
// pointer; a step takes it as it is when the step begins, and keeps it (epochs.h) until it ends.
// Nobody who only reads ever waits.
//
// One writer per block at a time: a step that appends to it, or a move under way.
//
// Source: arXiv 2504.06261 for blocks, views and moves; segments and their sharing are our own.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "blocks.h"
#include "epochs.h"
#include "pages.h"
#include "planner.h"

namespace alignops::attention::store {

// How much attention a worker pays to a block.
struct Knob {
  int64_t block;
  float bias = 0, gain = 1;
};

struct Worker {
  std::string name;
  std::vector<int64_t> view;  // blocks; the last one is written
  std::vector<Knob> knobs;
  bool active = true;
};

struct Layout {
  uint64_t version = 0;  // one more with every change
  std::vector<const Block*> blocks;
  std::vector<std::shared_ptr<const Worker>> workers;
  std::vector<int64_t> order;  // active workers
};

// Slots [src, src + count) are copied to [dst, dst + count), keys rotated by `shift` positions.
// Neither run crosses a page, and no page is both read and written.
struct Copy {
  int64_t src, dst, count, shift;
};

enum class MoveMode : int32_t { kAuto = 0, kSplice = 1, kRewrite = 2 };

// A move that has to copy keys and values: between begin_move and finish_move or cancel_move.
struct Move {
  struct Claim {
    int64_t page, end, count;
  };
  int64_t src = -1, dst = -1;
  Block result;
  std::vector<Copy> copies;
  std::vector<int64_t> pages;  // new ones
  std::vector<Claim> claims;   // slots of old ones
};

struct WorkspaceStats {
  int64_t blocks, workers, segments, tokens, pages, partial_pages;
};

// All functions are safe to call from several threads; a Step is for one at a time.
class Workspace {
 public:
  Workspace(std::shared_ptr<PagePool> pool, Form form);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  PagePool& pool() const { return *pool_; }
  const Form& form() const { return form_; }

  // Blocks and workers. Unknown numbers throw std::out_of_range.
  int64_t new_block(std::string name);
  int64_t add_worker(std::string name, std::span<const int64_t> view,
                     std::optional<int64_t> at_index);
  void set_view(int64_t worker, std::span<const int64_t> view);
  void set_knob(int64_t worker, const Knob& knob);
  int64_t fork_block(int64_t block);
  // A worker with the same view and knobs, but a fork of the block that it writes.
  int64_t fork_worker(int64_t worker, std::string name);
  // The same blocks and workers, without what is being written, over the same pages.
  std::unique_ptr<Workspace> fork();
  // It takes part in no step that does not name it.
  void retire_worker(int64_t worker);

  // Changes of a block. BlockBusy while it is being written.
  void evict(int64_t block, int64_t start, int64_t stop, bool close_gap);
  void truncate(int64_t block, int64_t length);

  // Everything of `src` goes to the end of `dst`. Where no byte has to move, it has happened;
  // otherwise the blocks are taken until `finish_move`, after the copies, or `cancel_move`.
  std::unique_ptr<Move> begin_move(int64_t src, int64_t dst, MoveMode mode, int64_t max_segments);
  void finish_move(Move& move);
  void cancel_move(Move& move);

  // Steps: planner.h.
  void begin(Step& step, const Request& request);
  // tokens: ids of all rows, if given. Throws StalePlan, and leaves the step open.
  void commit(Step& step, std::optional<std::span<const int64_t>> tokens);
  void abort(Step& step);
  // Whether what the step sees is still as it was. A lagged one does not care.
  bool fresh(const Step& step) const;

  // Runs body(layout) on the present layout, which stays as it is meanwhile.
  template <class Body>
  auto read(const Body& body) const {
    Epochs::Pin pin(pool_->epochs());
    pin.hold();
    return body(*layout_.load());
  }
  WorkspaceStats stats() const;

  // From files: a block with runs whose pages the caller has taken from the pool.
  int64_t restore_block(const Block& block);

 private:
  class Edit;

  void collect(Step& step, const Request& request, const Layout& layout) const;
  void reserve(Step& step);
  void undo(Step& step);
  void end(Step& step);
  void check_idle(const Layout& layout, int64_t block, const char* op) const;
  void compact(Move& move, size_t begin, const char* op);

  std::shared_ptr<PagePool> pool_;
  const Form form_;
  std::mutex mutex_;
  // Under the mutex.
  Recycler<Layout> layouts_;
  Recycler<Block> versions_;
  std::vector<const void*> writers_;     // of each block: the step or move that writes it
  std::vector<Block*> made_, replaced_;  // by the edit under way
  // Published.
  std::atomic<const Layout*> layout_;
};

}  // namespace alignops::attention::store
