// Blocks, workers and steps of a workspace without Python: what a step costs in memory, what is
// left after failures.
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "attention/errors.h"
#include "attention/workspace.h"
#include "harness.h"

namespace {

std::atomic<int64_t> allocations{0};

}  // namespace

// Counted; the sanitizers still see malloc. Not inlined, or GCC takes new and free for a mismatch.
[[gnu::noinline]] void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace alignops::attention::store {
namespace {

template <class Body>
bool exhausts(const Body& body) {
  try {
    body();
  } catch (const PoolExhausted&) {
    return true;
  }
  return false;
}

struct Four {
  std::shared_ptr<PagePool> pool;
  Workspace ws;
  int64_t common;
  std::vector<int64_t> own;

  explicit Four(int64_t pages)
      : pool(std::make_shared<PagePool>(pages, 16)),
        ws(pool, {false, {std::vector<double>(64, 0.5)}}),
        common(ws.new_block("common")) {
    for (int w = 0; w < 4; ++w) own.push_back(ws.new_block("own"));
    for (size_t w = 0; w < 4; ++w) {
      std::vector<int64_t> view{common};
      for (size_t u = 0; u < 4; ++u)
        if (u != w) view.push_back(own[u]);
      view.push_back(own[w]);
      ws.add_worker("worker", view, {});
    }
  }
};

const test::Register steady("a step allocates nothing once one as large was made", [] {
  Four four(64);
  Step step(four.pool->epochs());
  std::vector<int64_t> plan(1 << 16);
  const std::array<int64_t, 4> counts{1, 1, 1, 1};
  const auto make = [&] {
    four.ws.begin(step, {counts});
    step.fill(four.ws.form(), 16, plan.data());
    four.ws.commit(step, counts);
  };
  for (int i = 0; i < 120; ++i) make();
  for (const int64_t block : four.own) four.ws.truncate(block, 20);
  for (int i = 0; i < 20; ++i) make();  // page lists of their own again
  const int64_t before = allocations;
  for (int i = 0; i < 80; ++i) make();
  test::expect(allocations == before, "allocates");
  test::expect(plan[0] == kPlanMagic && four.ws.stats().tokens == 480, "did nothing");
});

const test::Register failure("what cannot be reserved leaves nothing behind", [] {
  Four four(5);
  Step step(four.pool->epochs());
  four.ws.begin(step, {std::array<int64_t, 4>{3, 3, 3, 0}});
  four.ws.commit(step, {});
  const auto claimed = [&] { four.ws.begin(step, {std::array<int64_t, 4>{10, 20, 20, 30}}); };
  test::expect(exhausts(claimed), "finds pages that are not there");
  test::expect(!step.open && four.pool->free_pages() == 2, "keeps pages");
  // The slots behind three tokens are to be had again, and a step that is given up returns them.
  for (int i = 0; i < 3; ++i) {
    four.ws.begin(step, {std::array<int64_t, 4>{13, 13, 13, 0}});
    test::expect(step.pages.empty(), "takes pages where slots are free");
    four.ws.abort(step);
  }
  test::expect(four.ws.stats().tokens == 9, "has written");
});

const test::Register rewriting("a move that finds no room for copies changes nothing", [] {
  Four four(4);
  Step step(four.pool->epochs());
  const std::vector<std::vector<int64_t>> views{{four.common}};
  four.ws.begin(step, {std::array<int64_t, 1>{30}, nullptr, &views});
  four.ws.commit(step, {});
  four.ws.begin(step, {std::array<int64_t, 4>{20, 0, 0, 0}});
  four.ws.commit(step, {});
  const auto move = [&](MoveMode mode) {
    return four.ws.begin_move(four.own[0], four.common, mode, 1);
  };
  test::expect(exhausts([&] { move(MoveMode::kRewrite); }), "rewrites without pages");
  test::expect(four.ws.stats().segments == 2 && four.pool->usage().used == 4, "has moved");
  test::expect(move(MoveMode::kAuto) == nullptr, "copies without being told to");
  test::expect(four.ws.stats().tokens == 50, "loses tokens");
});

}  // namespace
}  // namespace alignops::attention::store
