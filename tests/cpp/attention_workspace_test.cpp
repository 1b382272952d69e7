// Blocks, workers and steps of a workspace without Python.
#include <array>
#include <memory>
#include <vector>

#include "attention/errors.h"
#include "attention/workspace.h"
#include "harness.h"

namespace alignops::attention::store {
namespace {

const test::Register steps("a step appends to several blocks at once, a move hands them over", [] {
  const auto pool = std::make_shared<PagePool>(8, 16);
  Workspace ws(pool, {false, {{1.0, 0.5}}});
  const int64_t common = ws.new_block("common"), a = ws.new_block("a"), b = ws.new_block("b");
  ws.add_worker("a", std::array{common, b, a}, {});
  ws.add_worker("b", std::array{common, a, b}, {});
  Step step(pool->epochs());
  ws.begin(step, {std::array<int64_t, 2>{3, 20}});
  std::vector<int64_t> plan(static_cast<size_t>(step.words()));
  step.fill(ws.form(), 16, plan.data());
  test::expect(plan[0] == kPlanMagic && plan[3] == 23 && plan[4] == 2, "header of a plan");
  ws.commit(step, {});
  test::expect(ws.stats().tokens == 23 && pool->usage().used == 3, "three pages");
  test::expect(ws.begin_move(a, common, MoveMode::kSplice, 32) == nullptr, "moves no byte");
  test::expect(ws.read([&](const Layout& l) { return l.blocks[0]->extent; }) == 3, "moved");
});

}  // namespace
}  // namespace alignops::attention::store
