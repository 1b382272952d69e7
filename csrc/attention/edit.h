// A change of a workspace's layout, and the checks that all changes share.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "workspace.h"

namespace alignops::attention::store {

// For messages: the name in quotes, and who a worker is.
std::string quoted(const Block& block);
std::string named(const Worker& worker);
// Throw std::out_of_range.
void check_block(const Layout& layout, int64_t block, const char* op);
const Worker& worker_of(const Layout& layout, int64_t worker, const char* op);
// Throws LayoutError. own: the block that must be last; -1: any.
void check_view(const Layout& layout, std::span<const int64_t> view, int64_t own, const char* op,
                const std::string& who);

// A change of the layout: made on a copy, under the mutex, and published at the end. Without
// `publish` nothing has happened.
class Workspace::Edit {
 public:
  explicit Edit(Workspace& workspace)
      : workspace_(workspace), old_(*workspace.layout_.load()), layout(workspace.layouts_.fresh()) {
    layout = old_;
    ++layout.version;
    workspace_.made_.clear();
    workspace_.replaced_.clear();
  }
  ~Edit() {
    // Never seen by anybody, so of no time.
    for (Block* block : workspace_.made_) workspace_.versions_.retire(*block, 0);
    if (!published_) workspace_.layouts_.retire(layout, 0);
    const Epochs::Time oldest = workspace_.pool_->epochs().oldest();
    workspace_.layouts_.reclaim(oldest, [](Layout&) {});
    workspace_.versions_.reclaim(oldest, [](Block& block) { block.runs.clear(); });
  }
  Edit(const Edit&) = delete;
  Edit& operator=(const Edit&) = delete;

  // A version to be changed that replaces the block's.
  Block& replace(int64_t block) {
    const Block& old = *layout.blocks[static_cast<size_t>(block)];
    Block& fresh = add_version(old);
    layout.blocks[static_cast<size_t>(block)] = &fresh;
    workspace_.replaced_.push_back(const_cast<Block*>(&old));
    return fresh;
  }
  int64_t add_block(const Block& from) {
    layout.blocks.push_back(&add_version(from));
    workspace_.writers_.resize(layout.blocks.size(), nullptr);
    return static_cast<int64_t>(layout.blocks.size()) - 1;
  }
  // A new block with what another has now.
  int64_t fork(int64_t block) {
    const Block& from = *layout.blocks[static_cast<size_t>(block)];
    std::vector<int64_t> pages;
    from.append_pages(workspace_.pool_->page_size(), pages);
    workspace_.pool_->retain(pages);
    return add_block(from);
  }
  Worker& change(int64_t worker) {
    auto changed = std::make_shared<Worker>(*layout.workers[static_cast<size_t>(worker)]);
    Worker& out = *changed;
    layout.workers[static_cast<size_t>(worker)] = std::move(changed);
    return out;
  }
  // `released`: pages that lose a reference.
  void publish(std::span<const int64_t> released = {}) {
    workspace_.layout_.store(&layout);
    published_ = true;
    const Epochs::Time time = workspace_.pool_->epochs().advance();
    workspace_.layouts_.retire(const_cast<Layout&>(old_), time);
    for (Block* block : workspace_.replaced_) workspace_.versions_.retire(*block, time);
    workspace_.made_.clear();
    workspace_.pool_->release(released);
  }

 private:
  Block& add_version(const Block& from) {
    Block& fresh = workspace_.versions_.fresh();
    fresh = from;
    workspace_.made_.push_back(&fresh);
    return fresh;
  }

  Workspace& workspace_;
  const Layout& old_;
  bool published_ = false;

 public:
  Layout& layout;
};

}  // namespace alignops::attention::store
