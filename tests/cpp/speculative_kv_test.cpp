// Moves of cache slots without torch: every plan against copies slot by slot, with guard bytes, in
// parallel strips; refused plans; memory that tensors share; masks and trees.
#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "harness.h"
#include "speculative/layout.h"
#include "speculative/moves.h"

namespace alignops::test {
namespace {

using namespace speculative;

// A tensor in a buffer of its own, dimensions in any order, with gaps.
struct Cache {
  Guarded<char> buffer;
  CacheTensor tensor;

  Cache(Random& random, int64_t rows, int64_t heads, int64_t slots, int64_t bytes)
      : buffer(0), tensor{nullptr, rows, heads, slots, bytes, 0, 0, 0} {
    std::array<int64_t, 3> order{0, 1, 2}, sizes{rows, heads, slots}, strides{};
    for (int64_t i = 2; i > 0; --i)
      std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(random.below(i + 1))]);
    int64_t inner = bytes + random.below(3);
    for (const int64_t axis : order) {
      strides[static_cast<size_t>(axis)] = inner;
      inner *= std::max<int64_t>(sizes[static_cast<size_t>(axis)], 1) + random.below(2);
    }
    const int64_t offset = random.below(4);
    buffer = Guarded<char>(offset + inner);
    for (int64_t i = 0; i < offset + inner; ++i) buffer[i] = static_cast<char>(random.below(256));
    tensor.row_stride = strides[0];
    tensor.head_stride = strides[1];
    tensor.slot_stride = strides[2];
    offset_ = offset;
  }
  CacheTensor view() {
    CacheTensor t = tensor;
    t.data = buffer.data() + offset_;
    return t;
  }

 private:
  int64_t offset_ = 0;
};

char* slot(const CacheTensor& t, int64_t row, int64_t head, int64_t s) {
  return t.data + row * t.row_stride + head * t.head_stride + s * t.slot_stride;
}

// What the moves say, by the way of a copy of everything.
void apply_slowly(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
                  const std::vector<Move>& moves) {
  for (size_t i = 0; i < from.size(); ++i)
    for (int64_t head = 0; head < from[i].heads; ++head)
      for (const Move& move : moves) {
        const auto bytes = static_cast<size_t>(from[i].bytes);
        std::vector<char> kept;
        for (int64_t s = 0; s < move.count; ++s) {
          const char* source = slot(from[i], move.from_row, head, move.from_slot + s);
          kept.insert(kept.end(), source, source + bytes);
        }
        for (int64_t s = 0; s < move.count; ++s)
          std::memcpy(slot(to[i], move.to_row, head, move.to_slot + s),
                      kept.data() + static_cast<size_t>(s) * bytes, bytes);
      }
}

void run(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to, const Plan& plan,
         const ParallelFor& parallel) {
  const Transfer transfer(from, to, plan);
  parallel(0, transfer.strips(), 1, [&](int64_t begin, int64_t end) { transfer.run(begin, end); });
}

template <class Call>
bool refused(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

Ints ints(const std::vector<int32_t>& values) { return {values.data(), false}; }
Ints ints(const std::vector<int64_t>& values) { return {values.data(), true}; }

std::vector<Cache> random_caches(Random& random, int64_t rows, int64_t slots) {
  std::vector<Cache> caches;
  for (int64_t i = random.below(3); i >= 0; --i)
    caches.emplace_back(random, rows, 1 + random.below(3), slots, 1 + random.below(40));
  return caches;
}

std::vector<CacheTensor> views(std::vector<Cache>& caches) {
  std::vector<CacheTensor> all;
  for (Cache& cache : caches) all.push_back(cache.view());
  return all;
}

// `plan` in place, by strips on threads and slowly on a copy: equal in every byte of the buffers.
void expect_in_place(std::vector<Cache>& caches, const Plan& plan, const char* what) {
  std::vector<Cache> copies = caches;
  const std::vector<CacheTensor> expected = views(copies), tensors = views(caches);
  apply_slowly(expected, expected, plan.moves);
  run(tensors, tensors, plan, threads_for(3));
  for (size_t i = 0; i < caches.size(); ++i)
    expect(caches[i].buffer == copies[i].buffer && caches[i].buffer.intact(), what);
}

const Register shifts("shifts of every distance, in place, in both directions", [] {
  Random random(1);
  for (int64_t round = 0; round < 400; ++round) {
    const int64_t rows = random.below(4), slots = 1 + random.below(30);
    std::vector<Cache> caches = random_caches(random, rows, slots);
    std::vector<int32_t> src, dst, length;
    for (int64_t b = 0; b < rows; ++b) {
      length.push_back(static_cast<int32_t>(random.below(slots + 1)));
      src.push_back(static_cast<int32_t>(random.below(slots - length.back() + 1)));
      dst.push_back(static_cast<int32_t>(random.below(slots - length.back() + 1)));
    }
    const Plan plan = plan_shift("shift", ints(src), ints(dst), ints(length), rows, slots);
    expect(plan.groups() <= rows, "rows that do not move are no work");
    expect_in_place(caches, plan, "shift");
  }
});

const Register trees("paths of trees, in rows and across the borders of pages", [] {
  Random random(2);
  for (int64_t round = 0; round < 400; ++round) {
    const int64_t rows = random.below(4), page = 1 + random.below(5), per_row = 1 + random.below(4);
    const int64_t slots = page * per_row, nodes = random.below(6);
    std::vector<int64_t> base, length, path;
    for (int64_t b = 0; b < rows; ++b) {
      base.push_back(random.below(slots));
      int64_t last = -1, count = 0;
      for (int64_t j = 0; j < nodes; ++j) {
        const int64_t node = last + 1 + random.below(3);
        const bool fits = count == j && base.back() + node < slots;
        path.push_back(fits ? node : -7);
        if (fits) ++count, last = node;
      }
      length.push_back(count);
    }
    const TreePlan args{ints(base), ints(path), ints(length), rows, nodes};
    std::vector<Cache> caches = random_caches(random, rows, slots);
    expect_in_place(caches, plan_tree("tree", args, slots), "tree");

    std::vector<int32_t> table(static_cast<size_t>(rows * per_row));
    std::iota(table.rbegin(), table.rend(), 1);
    const Pages pages{ints(table), per_row, page, rows * per_row + 1};
    std::vector<Cache> paged = random_caches(random, pages.count, page);
    const Plan plan = plan_paged_tree("paged", args, pages);
    // The moves of a row are in rising order of target slots, and sources are never behind them.
    expect_in_place(paged, plan, "paged");
    int64_t moved = 0, expected = 0;
    for (const Move& move : plan.moves) moved += move.count;
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t j = 0; j < length[static_cast<size_t>(b)]; ++j)
        expected += path[static_cast<size_t>(b * nodes + j)] != j;
    expect(moved == expected, "only what changes its place moves");
  }
});

const Register between("gather and append, from one table to another", [] {
  Random random(3);
  for (int64_t round = 0; round < 400; ++round) {
    const int64_t rows = 1 + random.below(3), slots = 1 + random.below(12);
    const int64_t count = random.below(5), width = random.below(slots + 1);
    std::vector<Cache> caches = random_caches(random, rows, slots), out, news;
    for (Cache& cache : caches) {
      out.emplace_back(random, count, cache.tensor.heads, slots, cache.tensor.bytes);
      news.emplace_back(random, rows, cache.tensor.heads, width, cache.tensor.bytes);
    }
    std::vector<int32_t> map, lens;
    for (int64_t i = 0; i < count; ++i)
      map.push_back(static_cast<int32_t>(random.below(rows + 1)) - 1);
    for (int64_t b = 0; b < rows; ++b)
      lens.push_back(static_cast<int32_t>(random.below(slots - width + 1)));
    const Ints none{nullptr, false};
    const Plan taken =
        plan_gather("gather", {ints(map), count, none, none, none, false, rows, slots, slots});
    const Plan added = plan_append("append", ints(lens), none, rows, width, slots);
    const std::array<std::pair<std::vector<Cache>*, std::vector<Cache>*>, 2> pairs{
        std::pair{&caches, &out}, std::pair{&news, &caches}};
    for (size_t k = 0; k < 2; ++k) {
      const Plan& plan = k == 0 ? taken : added;
      std::vector<Cache>&from = *pairs[k].first, &to = *pairs[k].second;
      std::vector<Cache> copies = to;
      apply_slowly(views(from), views(copies), plan.moves);
      run(views(from), views(to), plan, threads_for(2));
      for (size_t i = 0; i < to.size(); ++i)
        expect(to[i].buffer == copies[i].buffer && to[i].buffer.intact(),
               k == 0 ? "gather" : "append");
    }
  }
});

const Register packed("packed rows close up in place", [] {
  Random random(4);
  for (int64_t round = 0; round < 200; ++round) {
    const int64_t rows = random.below(5);
    std::vector<int64_t> cu{0}, kept{0};
    for (int64_t b = 0; b < rows; ++b) {
      const int64_t length = random.below(6);
      cu.push_back(cu.back() + length);
      kept.push_back(kept.back() + random.below(length + 1));
    }
    std::vector<Cache> caches = random_caches(random, 1, cu.back());
    const Plan plan = plan_packed("packed", ints(cu), ints(kept), rows, cu.back(), cu.back(), true);
    expect(plan.groups() <= 1, "rows go where others were: one after the other");
    expect_in_place(caches, plan, "packed");
  }
});

const Register bad_plans("plans that leave the slots are refused", [] {
  using Values = std::vector<int64_t>;
  const Values zero{0, 0}, two{2, 2};
  const int64_t huge = INT64_MAX;
  for (const int64_t bad : {INT64_C(-1), INT64_C(5), huge, INT64_MIN, huge - 1}) {
    const Values at{0, bad};
    expect(refused([&] { plan_shift("", ints(at), ints(zero), ints(two), 2, 6); }), "src");
    expect(refused([&] { plan_shift("", ints(zero), ints(at), ints(two), 2, 6); }), "dst");
    const Values length{0, bad == 5 ? 7 : bad};
    expect(refused([&] { plan_shift("", ints(zero), ints(zero), ints(length), 2, 6); }), "length");
    expect(refused([&] { plan_append("", ints(at), {nullptr, false}, 2, 2, 6); }), "lens");
    expect(refused([&] { plan_append("", ints(zero), ints(length), 2, 6, 6); }), "counts");
    const Values path{0, 1, 0, bad == 5 ? 6 : bad};
    expect(refused([&] { plan_tree("", {ints(zero), ints(path), ints(two), 2, 2}, 6); }), "path");
    const Values table{0, bad};
    const Values steps{0, 2, 0, 2};
    expect(refused([&] {
             plan_paged_tree("", {ints(zero), ints(steps), ints(two), 2, 2},
                             {ints(table), 1, 4, 2});
           }),
           "block_table");
    const Values cu{0, bad == 5 ? 7 : bad};
    expect(refused([&] { plan_packed("", ints(cu), ints(zero), 1, 6, 6, false); }), "cu");
    if (bad >= 0) continue;
    std::vector<int32_t> out(2);
    const Realign realign{ints(at),   ints(zero), ints(zero), 2,
                          out.data(), out.data(), out.data(), out.data()};
    expect(refused([&] { plan_realign("", realign); }), "c");
  }
});

const Register sharing("tensors share memory exactly where a byte belongs to both", [] {
  Random random(5);
  int64_t shared = 0;
  for (int64_t round = 0; round < 4000; ++round) {
    // Two views of one buffer with the same strides.
    Cache cache(random, 1 + random.below(3), 1 + random.below(3), 1 + random.below(3),
                1 + random.below(3));
    CacheTensor a = cache.tensor;
    a.data = cache.buffer.data();
    CacheTensor b = a;
    b.data += random.below(60);
    const auto bytes_of = [](const CacheTensor& t) {
      std::vector<const char*> all;
      for (int64_t row = 0; row < t.rows; ++row)
        for (int64_t head = 0; head < t.heads; ++head)
          for (int64_t s = 0; s < t.slots; ++s)
            for (int64_t i = 0; i < t.bytes; ++i) all.push_back(slot(t, row, head, s) + i);
      std::sort(all.begin(), all.end());
      return all;
    };
    const std::vector<const char*> of_a = bytes_of(a), of_b = bytes_of(b);
    std::vector<const char*> both;
    std::set_intersection(of_a.begin(), of_a.end(), of_b.begin(), of_b.end(),
                          std::back_inserter(both));
    expect(!overlaps_itself(a), "strides with gaps do not overlap");
    expect(share_memory(a, b) == !both.empty() && share_memory(b, a) == !both.empty(), "sharing");
    shared += both.empty() ? 0 : 1;
    CacheTensor tight = a;
    tight.slot_stride = a.bytes - 1;
    if (a.slots > 1 && a.bytes > 1) expect(overlaps_itself(tight), "slots that overlap");
  }
  expect(shared > 400 && shared < 3600, "both cases occur");
});

const Register masks("masks in parts equal masks at once, and stay in their memory", [] {
  Random random(6);
  for (int64_t round = 0; round < 200; ++round) {
    const int64_t rows = 1 + random.below(3), columns = 1 + random.below(4);
    std::vector<int64_t> content, windows{0, 1 + random.below(5)};
    int64_t slots = 0;
    for (int64_t b = 0; b < rows; ++b) {
      content.push_back(random.below(70));
      slots = std::max(slots, content.back() + columns);
    }
    MaskArgs args{};
    args.queries.rows = rows;
    args.queries.columns = columns;
    args.queries.content = ints(content);
    args.slots = slots;
    args.windows = windows.data();
    args.window_count = 2;
    check_mask("", args);
    const int64_t lines = 2 * rows * columns;
    for (const int32_t element : {1, 2, 4, 8, 0}) {
      args.kind = element == 0   ? MaskKind::kBits
                  : element == 1 ? MaskKind::kBool
                                 : MaskKind::kAdditive;
      args.element = element;
      args.hidden = element > 1 ? 0xff7f : 0;
      const int64_t line = element == 0 ? (slots + 31) / 32 * 4 : slots * element;
      Guarded<char> whole(lines * line), parts(lines * line);
      args.out = whole.data();
      fill_mask(args, 0, lines);
      args.out = parts.data();
      threads_for(3)(0, lines, 1, [&](int64_t begin, int64_t end) { fill_mask(args, begin, end); });
      expect(whole == parts && whole.intact() && parts.intact(), "parts");
    }
  }
});

const Register tree_tables("tables of a chain and of a star with 64 nodes", [] {
  for (const bool chain : {true, false}) {
    std::vector<int32_t> parent(64), depth(64), first(64), next(64);
    std::vector<int64_t> bits(64);
    Guarded<bool> block(64 * 64);
    for (int32_t i = 0; i < 64; ++i) parent[static_cast<size_t>(i)] = chain || i == 0 ? i - 1 : 0;
    const TreeTables tables{ints(parent), 1,           64,          depth.data(), bits.data(),
                            first.data(), next.data(), block.data()};
    check_tree("", tables);
    fill_tree(tables);
    expect(depth[63] == (chain ? 63 : 1), "depth");
    expect(static_cast<uint64_t>(bits[63]) == (chain ? ~UINT64_C(0) : (UINT64_C(1) << 63 | 1)),
           "ancestors");
    expect(first[0] == 1 && next[1] == (chain ? -1 : 2) && first[63] == -1, "children");
    expect(block[63 * 64 + 62] == chain && block[63 * 64 + 63] && block.intact(), "block");
  }
});

}  // namespace
}  // namespace alignops::test
