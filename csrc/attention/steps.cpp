// Steps of a workspace: snapshot and reservation, publication or return.
#include <algorithm>
#include <array>
#include <utility>

#include "../common/check.h"
#include "edit.h"
#include "errors.h"
#include "workspace.h"

namespace alignops::attention::store {

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

template <class T>
int64_t size(const std::vector<T>& values) {
  return static_cast<int64_t>(values.size());
}

constexpr int64_t kMaxRows = int64_t{1} << 30;

}  // namespace

void Workspace::collect(Step& step, const Request& request, const Layout& layout) const {
  step.lagged = request.lagged;
  step.implicit_self = request.implicit_self;
  step.layout = &layout;
  step.entries.clear();
  step.views.clear();
  step.writes.clear();
  step.pages.clear();
  step.row_count = 0;
  const bool nobody = request.workers == nullptr && request.views != nullptr;
  const std::vector<int64_t>* workers =
      request.workers != nullptr ? request.workers : &layout.order;
  const int64_t count = nobody ? size(*request.views) : size(*workers);
  ALIGNOPS_CHECK(static_cast<int64_t>(request.counts.size()) == count,
                 "plan: counts must have one number for each of ", count,
                 nobody ? " views" : " workers", ", got ", request.counts.size());
  ALIGNOPS_CHECK(request.views == nullptr || size(*request.views) == count,
                 "plan: views must have one list for each of ", count, " workers, got ",
                 request.views == nullptr ? 0 : request.views->size());
  for (int64_t e = 0; e < count; ++e) {
    const int64_t rows = request.counts[at(e)], worker = nobody ? -1 : (*workers)[at(e)];
    const Worker* who = nobody ? nullptr : &worker_of(layout, worker, "plan");
    ALIGNOPS_CHECK(rows >= 0 && rows < kMaxRows - step.row_count,
                   "plan: counts must be at least 0 and small, got ", rows, " for entry ", e);
    std::span<const int64_t> view;
    if (request.views != nullptr) {
      view = (*request.views)[at(e)];
      check_view(layout, view, -1, "plan", who != nullptr ? named(*who) : message("entry ", e));
    } else {
      view = who->view;
    }
    const int64_t own = view.back();
    step.entries.push_back({worker, rows, step.row_count, size(step.views),
                            static_cast<int64_t>(view.size()), rows > 0 ? size(step.writes) : -1,
                            layout.blocks[at(own)]->extent});
    step.views.insert(step.views.end(), view.begin(), view.end());
    step.row_count += rows;
    if (rows == 0) continue;
    for (const Write& other : step.writes)
      if (other.block == own)
        throw LayoutError(message("plan: block ", quoted(*layout.blocks[at(own)]),
                                  " must be written by one entry, got a second one, ",
                                  who != nullptr ? named(*who) : message("entry ", e)));
    step.writes.push_back({own, layout.blocks[at(own)], rows, false, false, -1, 0, 0, 0, 0});
  }
}

void Workspace::reserve(Step& step) {
  const int64_t page_size = pool_->page_size();
  for (const Write& write : step.writes) check_idle(*step.layout, write.block, "plan");
  int64_t needed = 0;
  for (Write& write : step.writes) {
    int64_t rows = write.rows;
    if (!write.base->runs.empty()) {
      const Run& last = write.base->runs.back();
      write.extend = last.in_phase() && last.end() == write.base->extent;
      write.end = (last.first + last.n) % page_size;
      if (write.end > 0) {
        const int64_t page = last.pages(page_size).back();
        const int64_t fits = std::min(rows, page_size - write.end);
        if (pool_->claim(page, write.end, fits)) {
          write.tail = page;
          write.claimed = fits;
          rows -= fits;
        } else if (write.extend) {
          write.copy = true;
          rows += write.end;
        }
      }
    }
    write.pages = needed;
    write.count = (rows + page_size - 1) / page_size;
    needed += write.count;
  }
  // All at once: what cannot be had leaves nothing behind.
  pool_->take(needed, step.pages, "plan");
  for (const Write& write : step.writes) {
    writers_[at(write.block)] = &step;
    if (write.count == 0) continue;
    // The last new page is in use up to the last new token.
    const int64_t placed = write.first() + write.rows - (write.tail >= 0 ? page_size : 0);
    for (int64_t i = 0; i < write.count; ++i)
      pool_->claim(step.pages[at(write.pages + i)], 0, std::min(page_size, placed - i * page_size));
  }
}

void Workspace::begin(Step& step, const Request& request) {
  const bool writes =
      std::any_of(request.counts.begin(), request.counts.end(), [](int64_t n) { return n > 0; });
  std::unique_lock lock(mutex_, std::defer_lock);
  if (writes) lock.lock();
  step.pin.hold();
  try {
    collect(step, request, *layout_.load());
    if (writes) reserve(step);
  } catch (...) {
    for (const Write& write : step.writes)
      if (write.tail >= 0) pool_->unclaim(write.tail, write.end, write.claimed);
    step.writes.clear();
    end(step);
    throw;
  }
  step.open = true;
  if (writes) lock.unlock();
  step.tabulate(form_, pool_->page_size());
}

bool Workspace::fresh(const Step& step) const {
  const Layout* now = layout_.load();
  if (step.lagged || now == step.layout) return true;
  // The step keeps what it saw from being used again, so equal addresses are equal versions.
  for (const int64_t block : step.blocks)
    if (now->blocks[at(block)] != step.layout->blocks[at(block)]) return false;
  for (const Entry& entry : step.entries)
    if (entry.worker >= 0 &&
        now->workers[at(entry.worker)] != step.layout->workers[at(entry.worker)])
      return false;
  return true;
}

void Workspace::commit(Step& step, std::optional<std::span<const int64_t>> tokens) {
  ALIGNOPS_CHECK(!tokens || static_cast<int64_t>(tokens->size()) == step.row_count,
                 "commit: tokens must have one id for each of ", step.row_count, " rows, got ",
                 tokens ? tokens->size() : 0);
  const int64_t page_size = pool_->page_size();
  std::unique_lock lock(mutex_, std::defer_lock);
  if (!step.writes.empty()) lock.lock();
  if (!fresh(step))
    throw StalePlan(
        "commit: what the plan sees must be as it was, got a layout that has changed "
        "since; abort the plan and make a new one");
  if (step.writes.empty()) return end(step);

  for (const Entry& entry : step.entries)
    for (int64_t t = 0; t < entry.rows; ++t)
      pool_->token(step.slot(step.writes[at(entry.write)], t, page_size)) =
          tokens ? (*tokens)[at(entry.row + t)] : kNoToken;
  Edit edit(*this);
  step.scratch.clear();  // pages that lose a reference
  for (const Write& write : step.writes) {
    const auto pages = std::span(step.pages).subspan(at(write.pages), at(write.count));
    Block& block = edit.replace(write.block);
    if (write.copy) {
      const Step::PageCopy copy = step.page_copy(write, page_size);
      for (int64_t i = 0; i < copy.count; ++i)
        pool_->token(copy.dst + i) = pool_->token(copy.src + i);
      Run& last = block.runs.back();
      step.scratch.push_back(last.pages(page_size).back());
      last.list = own_list(last, 1, pages, page_size);
      last.begin = 0;
      last.n += write.rows;
      block.extent += write.rows;
    } else if (write.extend) {
      extend_last(block, pages, write.rows, page_size);
    } else {
      std::vector<int64_t> all;
      if (write.tail >= 0) {
        all.push_back(write.tail);
        pool_->retain(all);
      }
      all.insert(all.end(), pages.begin(), pages.end());
      append_run(block, std::make_shared<PageList>(all, kListRoom), write.first(), write.rows);
    }
    writers_[at(write.block)] = nullptr;
  }
  edit.publish(step.scratch);
  end(step);
}

void Workspace::abort(Step& step) {
  if (step.writes.empty()) return end(step);
  const std::lock_guard lock(mutex_);
  for (const Write& write : step.writes) {
    if (write.tail >= 0) pool_->unclaim(write.tail, write.end, write.claimed);
    writers_[at(write.block)] = nullptr;
  }
  pool_->release(step.pages);
  end(step);
}

void Workspace::end(Step& step) {
  step.open = false;
  step.layout = nullptr;
  step.pin.drop();
}

}  // namespace alignops::attention::store
