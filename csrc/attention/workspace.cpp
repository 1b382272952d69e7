#include "workspace.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "../common/check.h"
#include "edit.h"
#include "errors.h"

namespace alignops::attention::store {

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

template <class T>
int64_t size(const std::vector<T>& values) {
  return static_cast<int64_t>(values.size());
}

}  // namespace

std::string quoted(const Block& block) { return message("'", *block.name, "'"); }

void check_block(const Layout& layout, int64_t block, const char* op) {
  if (block < 0 || block >= size(layout.blocks))
    throw std::out_of_range(
        message(op, ": block must be below ", layout.blocks.size(), ", got ", block));
}

const Worker& worker_of(const Layout& layout, int64_t worker, const char* op) {
  if (worker < 0 || worker >= size(layout.workers))
    throw std::out_of_range(
        message(op, ": worker must be below ", layout.workers.size(), ", got ", worker));
  return *layout.workers[at(worker)];
}

// Of workers and of the entries of a step. `own`: the block that must be last; -1: any.
void check_view(const Layout& layout, std::span<const int64_t> view, int64_t own, const char* op,
                const std::string& who) {
  if (view.empty())
    throw LayoutError(message(op, ": the view of ", who,
                              " must end with the block that it writes, ", "got no blocks"));
  for (const int64_t block : view) check_block(layout, block, op);
  if (own >= 0 && view.back() != own)
    throw LayoutError(message(op, ": the view of ", who, " must end with its own block ",
                              quoted(*layout.blocks[at(own)]), ", got ",
                              quoted(*layout.blocks[at(view.back())])));
  for (size_t i = 0; i < view.size(); ++i)
    if (std::find(view.begin(), view.begin() + static_cast<std::ptrdiff_t>(i), view[i]) !=
        view.begin() + static_cast<std::ptrdiff_t>(i))
      throw LayoutError(message(op, ": the view of ", who, " must have each block once, got ",
                                quoted(*layout.blocks[at(view[i])]), " twice"));
}

std::string named(const Worker& worker) { return message("worker '", worker.name, "'"); }

Workspace::Workspace(std::shared_ptr<PagePool> pool, Form form)
    : pool_(std::move(pool)), form_(std::move(form)), layout_(&layouts_.fresh()) {}

Workspace::~Workspace() {
  std::vector<int64_t> pages;
  for (const Block* block : layout_.load()->blocks) block->append_pages(pool_->page_size(), pages);
  pool_->release(pages);
}

void Workspace::check_idle(const Layout& layout, int64_t block, const char* op) const {
  check_block(layout, block, op);
  if (writers_[at(block)] != nullptr)
    throw BlockBusy(message(op, ": block ", quoted(*layout.blocks[at(block)]),
                            " must not be written meanwhile, got one that an open plan or move "
                            "writes"));
}

// -------------------------------------------------------------------------------------------------
// Blocks and workers

int64_t Workspace::new_block(std::string name) {
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  Block block;
  block.name = std::make_shared<const std::string>(std::move(name));
  const int64_t id = edit.add_block(block);
  edit.publish();
  return id;
}

int64_t Workspace::restore_block(const Block& block) {
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  const int64_t id = edit.add_block(block);
  edit.publish();
  return id;
}

int64_t Workspace::add_worker(std::string name, std::span<const int64_t> view,
                              std::optional<int64_t> at_index) {
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  Layout& layout = edit.layout;
  check_view(layout, view, -1, "add_worker", message("worker '", name, "'"));
  for (const auto& other : layout.workers)
    if (other->active && other->view.back() == view.back())
      throw LayoutError(
          message("add_worker: worker '", name, "' must have a block of its own, got ",
                  quoted(*layout.blocks[at(view.back())]), ", which ", named(*other), " writes"));
  const int64_t place = at_index.value_or(size(layout.order));
  if (place < 0 || place > size(layout.order))
    throw std::out_of_range(
        message("add_worker: at_index must be from 0 to ", layout.order.size(), ", got ", place));
  auto worker = std::make_shared<Worker>();
  worker->name = std::move(name);
  worker->view.assign(view.begin(), view.end());
  const int64_t id = size(layout.workers);
  layout.workers.push_back(std::move(worker));
  layout.order.insert(layout.order.begin() + place, id);
  edit.publish();
  return id;
}

void Workspace::set_view(int64_t worker, std::span<const int64_t> view) {
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  const Worker& old = worker_of(edit.layout, worker, "set_view");
  check_view(edit.layout, view, old.view.back(), "set_view", named(old));
  edit.change(worker).view.assign(view.begin(), view.end());
  edit.publish();
}

void Workspace::set_knob(int64_t worker, const Knob& knob) {
  ALIGNOPS_CHECK(!std::isnan(knob.bias) && knob.bias < INFINITY,
                 "set_weight: bias must be a number or -inf, got ", knob.bias);
  ALIGNOPS_CHECK(std::isfinite(knob.gain), "set_weight: gain must be finite, got ", knob.gain);
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  worker_of(edit.layout, worker, "set_weight");
  check_block(edit.layout, knob.block, "set_weight");
  std::vector<Knob>& knobs = edit.change(worker).knobs;
  std::erase_if(knobs, [&](const Knob& other) { return other.block == knob.block; });
  if (knob.bias != 0 || knob.gain != 1) knobs.push_back(knob);
  edit.publish();
}

int64_t Workspace::fork_block(int64_t block) {
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  check_block(edit.layout, block, "fork_block");
  const int64_t id = edit.fork(block);
  edit.publish();
  return id;
}

int64_t Workspace::fork_worker(int64_t worker, std::string name) {
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  Layout& layout = edit.layout;
  auto fork = std::make_shared<Worker>(worker_of(layout, worker, "fork_worker"));
  const int64_t own = fork->view.back(), id = size(layout.workers);
  fork->name = std::move(name);
  fork->active = true;
  fork->view.back() = edit.fork(own);
  for (Knob& knob : fork->knobs)
    if (knob.block == own) knob.block = fork->view.back();
  layout.workers.push_back(std::move(fork));
  layout.order.push_back(id);
  edit.publish();
  return id;
}

std::unique_ptr<Workspace> Workspace::fork() {
  auto other = std::make_unique<Workspace>(pool_, form_);
  const std::lock_guard lock(mutex_);
  const Layout& layout = *layout_.load();
  const std::lock_guard other_lock(other->mutex_);
  Edit edit(*other);
  std::vector<int64_t> pages;
  for (const Block* block : layout.blocks) {
    // Page lists grow under the mutex of one workspace.
    Block copy = *block;
    for (Run& run : copy.runs) {
      run.list = own_list(run, 0, {}, pool_->page_size());
      run.begin = 0;
    }
    block->append_pages(pool_->page_size(), pages);
    edit.add_block(copy);
  }
  edit.layout.workers = layout.workers;
  edit.layout.order = layout.order;
  pool_->retain(pages);
  edit.publish();
  return other;
}

void Workspace::retire_worker(int64_t worker) {
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  worker_of(edit.layout, worker, "finish_worker");
  edit.change(worker).active = false;
  std::erase(edit.layout.order, worker);
  edit.publish();
}

void Workspace::evict(int64_t block, int64_t start, int64_t stop, bool close_gap) {
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  check_idle(edit.layout, block, "evict");
  const Block& old = *edit.layout.blocks[at(block)];
  if (start < 0 || start > stop || stop > old.extent)
    throw std::out_of_range(message("evict: start and stop must be ascending within block ",
                                    quoted(old), " of length ", old.extent, ", got ", start,
                                    " and ", stop));
  if (start == stop) return;
  std::vector<int64_t> before, after;
  old.append_pages(pool_->page_size(), before);
  Block& fresh = edit.replace(block);
  store::evict(fresh, start, stop, close_gap, pool_->page_size());
  fresh.append_pages(pool_->page_size(), after);
  pool_->retain(after);
  edit.publish(before);
}

void Workspace::truncate(int64_t block, int64_t length) {
  const std::lock_guard lock(mutex_);
  Edit edit(*this);
  check_idle(edit.layout, block, "truncate");
  const Block& old = *edit.layout.blocks[at(block)];
  if (length < 0 || length > old.extent)
    throw std::out_of_range(message("truncate: length must be from 0 to ", old.extent,
                                    " (of block ", quoted(old), "), got ", length));
  if (length == old.extent) return;
  std::vector<int64_t> before, after;
  old.append_pages(pool_->page_size(), before);
  Block& fresh = edit.replace(block);
  store::evict(fresh, length, old.extent, true, pool_->page_size());
  fresh.append_pages(pool_->page_size(), after);
  pool_->retain(after);
  edit.publish(before);
}

WorkspaceStats Workspace::stats() const {
  return read([&](const Layout& layout) {
    WorkspaceStats out{size(layout.blocks), size(layout.order), 0, 0, 0, 0};
    for (const Block* block : layout.blocks) {
      out.segments += size(block->runs);
      out.tokens += block->tokens();
      out.pages += block->pages(pool_->page_size());
      out.partial_pages += block->partial_pages(pool_->page_size());
    }
    return out;
  });
}

}  // namespace alignops::attention::store
