// Moves of whole blocks. Handing over runs moves no byte: they keep their rotations (r0), and the
// queries that meet them turn further. Too many runs, or pages filled in part, cost time and room;
// then runs that are out of phase are copied behind each other into full pages, with their keys
// rotated into place. That rounds, so each key takes part once in its life.
#include <algorithm>
#include <utility>

#include "../common/check.h"
#include "edit.h"
#include "errors.h"
#include "workspace.h"

namespace alignops::attention::store {

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

bool loose(const Run& run) { return !run.in_phase() && !run.rewritten; }

bool uses_page(const Run& run, int64_t page, int64_t page_size) {
  const auto pages = run.pages(page_size);
  return std::find(pages.begin(), pages.end(), page) != pages.end();
}

}  // namespace

// Runs of `move.result` from `begin` on.
void Workspace::compact(Move& move, size_t begin, const char* op) {
  const int64_t page_size = pool_->page_size();
  const std::vector<Run> from = std::move(move.result.runs);
  std::vector<Run>& to = move.result.runs;
  to.assign(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(begin));
  for (size_t i = begin; i < from.size();) {
    if (!loose(from[i])) {
      to.push_back(from[i++]);
      continue;
    }
    size_t end = i;
    int64_t total = 0;
    for (;
         end < from.size() && loose(from[end]) && (end == i || from[end].s0 == from[end - 1].end());
         ++end)
      total += from[end].n;

    // Behind the run before, if that is in phase; its last page may have room.
    const bool joins = !to.empty() && to.back().in_phase() && to.back().end() == from[i].s0;
    const int64_t filled = joins ? (to.back().first + to.back().n) % page_size : 0;
    int64_t claimed = 0, tail = -1;
    if (filled > 0) {
      tail = to.back().pages(page_size).back();
      claimed = std::min(total, page_size - filled);
      const bool read = std::any_of(
          from.begin() + static_cast<std::ptrdiff_t>(begin), from.end(),
          [&](const Run& run) { return loose(run) && uses_page(run, tail, page_size); });
      if (read || !pool_->claim(tail, filled, claimed)) claimed = 0;
    }
    if (claimed > 0) move.claims.push_back({tail, filled, claimed});
    const size_t first_page = move.pages.size();
    pool_->take((total - claimed + page_size - 1) / page_size, move.pages, op);
    const auto pages = std::span(move.pages).subspan(first_page);
    for (size_t k = 0; k < pages.size(); ++k)
      pool_->claim(pages[k], 0,
                   std::min(page_size, total - claimed - static_cast<int64_t>(k) * page_size));
    if (joins && (claimed > 0 || filled == 0)) {
      to.back().list = own_list(to.back(), 0, pages, page_size);
      to.back().begin = 0;
      to.back().n += total;
      to.back().rewritten = true;
    } else {
      to.push_back({std::make_shared<PageList>(pages, kListRoom), 0, 0, total, from[i].s0,
                    from[i].s0, true});
    }
    // Copies that cross no page on either side.
    int64_t place = to.back().n - total;
    for (; i < end; ++i)
      for (int64_t k = 0; k < from[i].n;) {
        const int64_t src = from[i].slot(k, page_size), dst = to.back().slot(place, page_size);
        const int64_t count =
            std::min({from[i].n - k, page_size - src % page_size, page_size - dst % page_size});
        move.copies.push_back({src, dst, count, from[i].s0 - from[i].r0});
        k += count;
        place += count;
      }
  }
}

std::unique_ptr<Move> Workspace::begin_move(int64_t src, int64_t dst, MoveMode mode,
                                            int64_t max_segments) {
  const int64_t page_size = pool_->page_size();
  const std::lock_guard lock(mutex_);
  const Layout& layout = *layout_.load();
  check_idle(layout, src, "move");
  check_idle(layout, dst, "move");
  const Block& from = *layout.blocks[at(src)];
  const Block& to = *layout.blocks[at(dst)];
  ALIGNOPS_CHECK(src != dst, "move: dst must be another block than src, got ", quoted(to),
                 " twice");
  auto move = std::make_unique<Move>();
  move->src = src;
  move->dst = dst;
  move->result = to;
  splice(move->result, from);
  size_t begin = move->result.runs.size();
  if (mode == MoveMode::kRewrite) {
    begin = to.runs.size();
  } else if (mode == MoveMode::kAuto) {
    const int64_t pages = move->result.pages(page_size);
    if (static_cast<int64_t>(move->result.runs.size()) > max_segments ||
        4 * move->result.partial_pages(page_size) > pages)
      begin = 0;
  }
  try {
    compact(*move, begin, "move");
  } catch (const PoolExhausted&) {
    for (const Move::Claim& claim : move->claims)
      pool_->unclaim(claim.page, claim.end, claim.count);
    pool_->release(move->pages);
    if (mode != MoveMode::kAuto) throw;
    // Nobody asked for more than the move: the next one may find room.
    move->copies.clear();
    move->result = to;
    splice(move->result, from);
  }
  if (!move->copies.empty()) {
    writers_[at(src)] = writers_[at(dst)] = move.get();
    return move;
  }
  // The runs change hands, and their pages with them.
  Edit edit(*this);
  edit.replace(dst) = std::move(move->result);
  Block& empty = edit.replace(src);
  empty.runs.clear();
  empty.extent = 0;
  edit.publish();
  return nullptr;
}

void Workspace::finish_move(Move& move) {
  const int64_t page_size = pool_->page_size();
  const std::lock_guard lock(mutex_);
  for (const Copy& copy : move.copies)
    for (int64_t i = 0; i < copy.count; ++i)
      pool_->token(copy.dst + i) = pool_->token(copy.src + i);
  Edit edit(*this);
  std::vector<int64_t> before, after;
  edit.layout.blocks[at(move.src)]->append_pages(page_size, before);
  edit.layout.blocks[at(move.dst)]->append_pages(page_size, before);
  move.result.append_pages(page_size, after);
  // New pages have their reference from `take`.
  std::erase_if(after, [&](int64_t page) {
    return std::find(move.pages.begin(), move.pages.end(), page) != move.pages.end();
  });
  pool_->retain(after);
  edit.replace(move.dst) = std::move(move.result);
  Block& empty = edit.replace(move.src);
  empty.runs.clear();
  empty.extent = 0;
  writers_[at(move.src)] = writers_[at(move.dst)] = nullptr;
  edit.publish(before);
}

void Workspace::cancel_move(Move& move) {
  const std::lock_guard lock(mutex_);
  for (const Move::Claim& claim : move.claims) pool_->unclaim(claim.page, claim.end, claim.count);
  writers_[at(move.src)] = writers_[at(move.dst)] = nullptr;
  pool_->release(move.pages);
}

}  // namespace alignops::attention::store
