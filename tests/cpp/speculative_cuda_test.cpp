// The CUDA moves of the speculative core, run on the CPU and compared with its own.
#include "cuda_on_host.h"
// The kernels come after the host's stand-ins for the CUDA language.
#include "speculative/cuda/moves.cu"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "harness.h"

namespace alignops::speculative {
namespace {

using cuda::Launch;
using test::expect;
using test::Random;
using Bytes = std::vector<char>;
using Numbers = std::vector<int64_t>;

constexpr const char* kOp = "test";

// Numbers as a plan holds them, int32 or int64.
class Vector {
 public:
  Vector(Numbers values, bool wide)
      : wide_(wide), values_(std::move(values)), narrow_(values_.begin(), values_.end()) {}
  operator Ints() const {  // NOLINT(google-explicit-constructor): as a tensor would be
    return {wide_ ? static_cast<const void*>(values_.data()) : narrow_.data(), wide_};
  }

 private:
  bool wide_;
  Numbers values_;
  std::vector<int32_t> narrow_;
};

constexpr Ints kAbsent{nullptr, false};

// The layout of a cache in one buffer; tensors of the same cache have the same rows.
struct Layout {
  std::vector<CacheTensor> tensors;  // data: offset from the beginning of the buffer
  int64_t bytes = 0;

  std::vector<CacheTensor> in(Bytes& buffer) const {
    std::vector<CacheTensor> out = tensors;
    for (CacheTensor& t : out) t.data = buffer.data() + reinterpret_cast<uintptr_t>(t.data);
    return out;
  }
};

struct Shape {
  int64_t rows, heads, slots, bytes;
};

// Rows, heads and slots in some order, with gaps, at some alignment.
void add(Layout& layout, Random& random, const Shape& shape) {
  const int64_t unit = random.pick<int64_t>({1, 2, 4, 8, 16});
  const auto padded = [&](int64_t bytes) {
    return (bytes + unit - 1) / unit * unit + unit * random.below(2) * random.below(3);
  };
  CacheTensor t{nullptr, shape.rows, shape.heads, shape.slots, shape.bytes, 0, 0, 0};
  const bool slots_inside = random.below(2) == 0;
  if (slots_inside) {
    t.slot_stride = random.below(2) == 0 ? shape.bytes : padded(shape.bytes);
    t.head_stride = padded(t.slot_stride * shape.slots);
    t.row_stride = padded(t.head_stride * shape.heads);
  } else {
    t.head_stride = random.below(2) == 0 ? shape.bytes : padded(shape.bytes);
    t.slot_stride = padded(t.head_stride * shape.heads);
    t.row_stride = padded(t.slot_stride * shape.slots);
  }
  const int64_t begin = (layout.bytes + 15) / 16 * 16 + unit;
  // An offset, not an address.
  t.data = reinterpret_cast<char*>(begin);  // NOLINT(performance-no-int-to-ptr)
  layout.tensors.push_back(t);
  layout.bytes = begin + t.row_stride * shape.rows + unit;
}

Bytes sample_bytes(Random& random, int64_t size) {
  Bytes out(static_cast<size_t>(size));
  for (char& byte : out) byte = static_cast<char>(random.below(256));
  return out;
}

int64_t sample_item(Random& random) {
  return random.pick<int64_t>({1, 2, 3, 4, 6, 8, 16, 24, 32, 64, 80, 256});
}

void run_on_cpu(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
                const Plan& plan) {
  const Transfer transfer(from, to, plan);
  transfer.run(0, transfer.strips());
}

struct Case {
  Random random;
  bool wide;
  int64_t rows;

  explicit Case(uint32_t seed) : random(seed), wide(random.below(2) == 0), rows(random.below(5)) {}

  // One number per row.
  template <class Draw>
  Numbers each(const Draw& draw) {
    Numbers out;
    for (int64_t row = 0; row < rows; ++row) out.push_back(draw(row));
    return out;
  }
  // A cache and the smallest number of slots of its tensors.
  Layout cache(int64_t& slots) {
    Layout out;
    slots = random.pick<int64_t>({1, 2, 7, 40, 700});
    for (int64_t i = 1 + random.below(3); i > 0; --i)
      add(out, random, {rows, 1 + random.below(3), slots + random.below(2), sample_item(random)});
    return out;
  }
};

template <class Body>
void for_seeds(uint32_t seeds, const Body& body) {
  for (uint32_t seed = 0; seed < seeds; ++seed) body(seed, "seed " + std::to_string(seed));
}

// A move in place: on_cpu(tensors) and on_gpu(tensors, launch) must leave the same bytes.
template <class OnCpu, class OnGpu>
void check_in_place(Random& random, const Layout& layout, const std::string& name,
                    const OnCpu& on_cpu, const OnGpu& on_gpu) {
  Bytes wanted = sample_bytes(random, layout.bytes), got = wanted;
  on_cpu(layout.in(wanted));
  Launch launch{};
  expect(on_gpu(layout.in(got), launch) == cudaSuccess, name + ", launch");
  expect(got == wanted, name);
}

template <class OnCpu, class OnGpu>
void check_copy(Random& random, const Layout& source, const Layout& target, const std::string& name,
                const OnCpu& on_cpu, const OnGpu& on_gpu) {
  Bytes from = sample_bytes(random, source.bytes);
  const Bytes before = from;
  Bytes wanted = sample_bytes(random, target.bytes), got = wanted;
  on_cpu(source.in(from), target.in(wanted));
  Launch launch{};
  expect(on_gpu(source.in(from), target.in(got), launch) == cudaSuccess, name + ", launch");
  expect(got == wanted && from == before, name);
}

const test::Register shifts("kv_shift equals the CPU's", [] {
  for_seeds(150, [](uint32_t seed, const std::string& name) {
    Case c(seed);
    int64_t slots = 0;
    const Layout layout = c.cache(slots);
    const Numbers length = c.each([&](int64_t) { return c.random.below(slots + 1); });
    const auto start = [&](int64_t row) {
      return c.random.below(slots - length[static_cast<size_t>(row)] + 1);
    };
    const Vector src(c.each(start), c.wide), dst(c.each(start), c.wide), count(length, c.wide);
    check_in_place(
        c.random, layout, name,
        [&](const auto& t) { run_on_cpu(t, t, plan_shift(kOp, src, dst, count, c.rows, slots)); },
        [&](const auto& t, Launch& launch) {
          return cuda::shift(t, {src, dst, count, kAbsent}, launch);
        });
  });
});

// The same tensors with other slots.
Layout like(const Layout& layout, Random& random, int64_t rows, int64_t slots) {
  Layout out;
  for (const CacheTensor& t : layout.tensors) add(out, random, {rows, t.heads, slots, t.bytes});
  return out;
}

const test::Register gathers("kv_gather equals the CPU's, with and without a shift", [] {
  for_seeds(150, [](uint32_t seed, const std::string& name) {
    Case c(seed);
    int64_t slots = 0;
    const Layout source = c.cache(slots);
    const int64_t from_rows = c.rows, to_slots = slots + 1 + c.random.below(20);
    c.rows = c.random.below(6);
    const Layout target = like(source, c.random, c.rows, to_slots);
    const bool shifted = c.random.below(2) == 0;
    const Vector rows(c.each([&](int64_t) { return c.random.below(from_rows + 1) - 1; }), c.wide);
    const Numbers length = c.each([&](int64_t) { return c.random.below(slots + 1); });
    const auto start = [&](int64_t limit) {
      return c.each([&](int64_t row) {
        return c.random.below(limit - length[static_cast<size_t>(row)] + 1);
      });
    };
    const Vector src(start(slots), c.wide), dst(start(to_slots), c.wide), count(length, c.wide);
    GatherPlan plan{rows, c.rows, src, dst, count, false, from_rows, slots, to_slots};
    if (!shifted) {
      plan.src = plan.dst = plan.length = kAbsent;
      for (const CacheTensor& t : source.tensors)
        if (t.slots != slots) return;  // without a shift all slots go, of all tensors
    }
    check_copy(
        c.random, source, target, name,
        [&](const auto& from, const auto& to) { run_on_cpu(from, to, plan_gather(kOp, plan)); },
        [&](const auto& from, const auto& to, Launch& launch) {
          return cuda::gather(from, to, plan, launch);
        });
  });
});

const test::Register gathers_in_place("kv_gather in place equals the CPU's", [] {
  for_seeds(60, [](uint32_t seed, const std::string& name) {
    Case c(seed);
    int64_t slots = 0;
    const Layout layout = c.cache(slots);
    const Vector rows(c.each([&](int64_t row) { return c.random.below(3) == 0 ? -1 : row; }),
                      c.wide);
    const Numbers length = c.each([&](int64_t) { return c.random.below(slots + 1); });
    const auto start = [&](int64_t row) {
      return c.random.below(slots - length[static_cast<size_t>(row)] + 1);
    };
    const Vector src(c.each(start), c.wide), dst(c.each(start), c.wide), count(length, c.wide);
    const GatherPlan plan{rows, c.rows, src, dst, count, true, c.rows, slots, slots};
    check_in_place(
        c.random, layout, name, [&](const auto& t) { run_on_cpu(t, t, plan_gather(kOp, plan)); },
        [&](const auto& t, Launch& launch) { return cuda::gather(t, t, plan, launch); });
  });
});

const test::Register appends("ragged_append equals the CPU's", [] {
  for_seeds(100, [](uint32_t seed, const std::string& name) {
    Case c(seed);
    int64_t slots = 0;
    const Layout target = c.cache(slots);
    const int64_t columns = c.random.below(std::min<int64_t>(slots, 9) + 1);
    if (columns == 0 || c.rows == 0) return;
    const Layout source = like(target, c.random, c.rows, columns);
    const bool counted = c.random.below(2) == 0;
    const Numbers number =
        c.each([&](int64_t) { return counted ? c.random.below(columns + 1) : columns; });
    const Vector counts(number, c.wide);
    const Vector lens(c.each([&](int64_t row) {
      return c.random.below(slots - number[static_cast<size_t>(row)] + 1);
    }),
                      c.wide);
    const Ints given = counted ? static_cast<Ints>(counts) : kAbsent;
    check_copy(
        c.random, source, target, name,
        [&](const auto& from, const auto& to) {
          run_on_cpu(from, to, plan_append(kOp, lens, given, c.rows, columns, slots));
        },
        [&](const auto& from, const auto& to, Launch& launch) {
          return cuda::append(from, to, {lens, given}, launch);
        });
  });
});

// Rising nodes below `limit`, `nodes` of them at most, then -1.
Numbers sample_path(Random& random, int64_t nodes, int64_t limit, int64_t& length) {
  Numbers out(static_cast<size_t>(nodes), -1);
  length = 0;
  for (int64_t node = 0; node < limit && length < nodes; ++node)
    if (random.below(4) > 0) out[static_cast<size_t>(length++)] = node;
  return out;
}

struct SampledTree {
  Numbers base, path, length;
  int64_t nodes;

  SampledTree(Case& c, int64_t slots) : nodes(1 + c.random.below(std::min<int64_t>(slots, 600))) {
    for (int64_t row = 0; row < c.rows; ++row) {
      const int64_t room = 1 + c.random.below(slots);
      int64_t count = 0;
      const Numbers row_path = sample_path(c.random, nodes, room, count);
      path.insert(path.end(), row_path.begin(), row_path.end());
      base.push_back(c.random.below(slots - room + 1));
      length.push_back(count);
    }
  }
};

const test::Register trees("kv_tree equals the CPU's", [] {
  for_seeds(120, [](uint32_t seed, const std::string& name) {
    Case c(seed);
    int64_t slots = 0;
    const Layout layout = c.cache(slots);
    const SampledTree sampled(c, slots);
    const Vector base(sampled.base, c.wide), path(sampled.path, c.wide),
        length(sampled.length, c.wide);
    const TreePlan plan{base, path, length, c.rows, sampled.nodes};
    check_in_place(
        c.random, layout, name,
        [&](const auto& t) { run_on_cpu(t, t, plan_tree(kOp, plan, slots)); },
        [&](const auto& t, Launch& launch) { return cuda::tree(t, plan, launch); });
  });
});

const test::Register paged_trees(
    "kv_paged_tree equals the CPU's, with pages that do not exist", [] {
      for_seeds(120, [](uint32_t seed, const std::string& name) {
        Case c(seed);
        const int64_t page = c.random.pick<int64_t>({1, 3, 16}), per_row = 1 + c.random.below(6);
        const int64_t pages = c.rows * per_row + 2;
        Layout layout;
        for (int64_t i = 1 + c.random.below(2); i > 0; --i)
          add(layout, c.random, {pages, 1 + c.random.below(3), page, sample_item(c.random)});
        const SampledTree sampled(c, page * per_row);
        Numbers table(static_cast<size_t>(c.rows * per_row));
        std::iota(table.begin(), table.end(), 1);
        std::reverse(table.begin(), table.end());
        for (int64_t row = 0; row < c.rows; ++row) {
          // Pages in which nothing moves need not exist: those before the first slot that does.
          const auto r = static_cast<size_t>(row);
          int64_t first = 0;
          while (first < sampled.length[r] &&
                 sampled.path[static_cast<size_t>(row * sampled.nodes + first)] == first)
            ++first;
          const int64_t touched = (sampled.base[r] + first) / page;
          for (int64_t i = 0; i < touched && i < per_row; ++i)
            table[static_cast<size_t>(row * per_row + i)] = -1;
        }
        const Vector base(sampled.base, c.wide), path(sampled.path, c.wide),
            length(sampled.length, c.wide), blocks(table, c.wide);
        const TreePlan plan{base, path, length, c.rows, sampled.nodes};
        const Pages where{blocks, per_row, page, pages};
        check_in_place(
            c.random, layout, name,
            [&](const auto& t) { run_on_cpu(t, t, plan_paged_tree(kOp, plan, where)); },
            [&](const auto& t, Launch& launch) {
              return cuda::paged_tree(t, plan, where, launch);
            });
      });
    });

const test::Register packs("kv_packed equals the CPU's, in place and not", [] {
  for_seeds(150, [](uint32_t seed, const std::string& name) {
    Case c(seed);
    const bool in_place = c.random.below(2) == 0;
    Numbers cu{c.random.below(4)}, new_cu{in_place ? c.random.below(cu[0] + 1) : c.random.below(4)};
    for (int64_t row = 0; row < c.rows; ++row) {
      cu.push_back(cu.back() + c.random.below(40));
      const int64_t length = c.random.below(40);
      new_cu.push_back(in_place ? std::min(cu.back(), new_cu.back() + length)
                                : new_cu.back() + length);
    }
    const int64_t from_slots = cu.back() + 1, to_slots = new_cu.back() + 1;
    Layout source;
    for (int64_t i = 1 + c.random.below(3); i > 0; --i)
      add(source, c.random, {1, 1 + c.random.below(3), from_slots, sample_item(c.random)});
    const Vector begin(cu, c.wide), end(new_cu, c.wide);
    const cuda::Packed plan{begin, end, c.rows, in_place};
    if (in_place) {
      check_in_place(
          c.random, source, name,
          [&](const auto& t) {
            run_on_cpu(t, t, plan_packed(kOp, begin, end, c.rows, from_slots, from_slots, true));
          },
          [&](const auto& t, Launch& launch) { return cuda::packed(t, t, plan, launch); });
      return;
    }
    check_copy(
        c.random, source, like(source, c.random, 1, to_slots), name,
        [&](const auto& from, const auto& to) {
          run_on_cpu(from, to, plan_packed(kOp, begin, end, c.rows, from_slots, to_slots, false));
        },
        [&](const auto& from, const auto& to, Launch& launch) {
          return cuda::packed(from, to, plan, launch);
        });
  });
});

const test::Register many("hundreds of tensors take several launches", [] {
  Case c(5);
  c.rows = 2;
  Layout layout;
  for (int i = 0; i < 430; ++i) add(layout, c.random, {2, 1, 5, 1 + c.random.below(9)});
  const Vector src({0, 2}, false), dst({1, 0}, false), length({4, 3}, false);
  check_in_place(
      c.random, layout, "430 tensors",
      [&](const auto& t) { run_on_cpu(t, t, plan_shift(kOp, src, dst, length, 2, 5)); },
      [&](const auto& t, Launch& launch) {
        return cuda::shift(t, {src, dst, length, kAbsent}, launch);
      });
});

// Memory is allocated to the exact size: sanitizers see what is touched outside; gaps between slots
// keep their bytes.
const test::Register damage("plans that point outside write nothing there", [] {
  for_seeds(80, [](uint32_t seed, const std::string& name) {
    Case c(seed);
    const Numbers bad{-1, 0, 3, 1000, -1000, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN};
    const auto draw = [&](int64_t count) {
      Numbers out;
      for (int64_t i = 0; i < count; ++i)
        out.push_back(c.random.below(2) == 0 ? c.random.below(8) : c.random.pick(bad));
      return Vector(out, c.wide);
    };
    int64_t slots = 0;
    const Layout layout = c.cache(slots), other = like(layout, c.random, 3, 5);
    Bytes buffer = sample_bytes(c.random, layout.bytes);
    Bytes source = sample_bytes(c.random, other.bytes), untouched = buffer;
    const std::vector<CacheTensor> caches = layout.in(buffer), from = other.in(source);
    const Vector rows = draw(c.rows), a = draw(c.rows), b = draw(c.rows), n = draw(c.rows);
    const Vector path = draw(c.rows * 4), table = draw(c.rows * 3), cu = draw(c.rows + 1),
                 new_cu = draw(c.rows + 1);
    Launch launch{};
    cuda::shift(caches, {a, b, n, kAbsent}, launch);
    cuda::gather(from, caches, {rows, c.rows, a, b, n, false, 3, 5, slots}, launch);
    cuda::tree(caches, {a, path, n, c.rows, 4}, launch);
    cuda::paged_tree(caches, {a, path, n, c.rows, 4}, {table, 3, slots, c.rows}, launch);
    std::vector<CacheTensor> long_row = caches;
    for (CacheTensor& t : long_row) t.rows = std::min<int64_t>(t.rows, 1);
    cuda::packed(long_row, long_row, {cu, new_cu, c.rows, true}, launch);
    cuda::packed(from, long_row, {cu, new_cu, c.rows, false}, launch);
    if (c.rows == 3) cuda::append(from, caches, {a, b}, launch);
    for (const CacheTensor& t : layout.tensors)
      for (int64_t r = 0; r < t.rows; ++r)
        for (int64_t h = 0; h < t.heads; ++h)
          for (int64_t s = 0; s < t.slots; ++s) {
            const int64_t at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data)) +
                               r * t.row_stride + h * t.head_stride + s * t.slot_stride;
            std::copy_n(buffer.begin() + at, t.bytes, untouched.begin() + at);
          }
    expect(untouched == buffer, name);
  });
});

const test::Register left_out("rows whose plan does not fit are left out, others move", [] {
  for_seeds(40, [](uint32_t seed, const std::string& name) {
    Case c(seed);
    c.rows = 4;
    Layout layout;
    add(layout, c.random, {4, 2, 10, sample_item(c.random)});
    // Two rows that fit, one too long, one that begins before the first slot.
    Numbers src{0, 3, 4, -1}, dst{2, 1, 5, 0}, length{8, 7, 6, 2}, good{8, 7, 0, 0};
    Numbers from{0, 3, 0, 0}, to{2, 1, 0, 0};
    const Vector bad_src(src, c.wide), bad_dst(dst, c.wide), bad_length(length, c.wide),
        good_length(good, c.wide), good_src(from, c.wide), good_dst(to, c.wide);
    check_in_place(
        c.random, layout, name,
        [&](const auto& t) {
          run_on_cpu(t, t, plan_shift(kOp, good_src, good_dst, good_length, 4, 10));
        },
        [&](const auto& t, Launch& launch) {
          return cuda::shift(t, {bad_src, bad_dst, bad_length, kAbsent}, launch);
        });
  });
});

}  // namespace
}  // namespace alignops::speculative

int main() { return alignops::test::run_all(); }
