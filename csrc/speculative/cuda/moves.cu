// Moves of cache slots on a GPU, with the results of the CPU (moves.h).
//
// A block takes a strip: the slots of one head of one row of one tensor. Its moves are a list of
// items, the bytes of a slot, cut into words of up to 16 bytes. The threads load a chunk of words
// into registers and store them after a barrier. Items that go right are walked from the end, the
// others from the beginning: a word goes where a word lay that the walk has loaded already, so a
// chunk is all the memory that a move in place needs, and one launch does all tensors. Out of place
// there is no barrier, and long strips are cut into pieces. A row that stays where it is costs
// blocks that return at once.
//
// The table of tensors is a parameter of the kernel, which may have 32 KiB since CUDA 12.1: nothing
// is copied to the device, and a captured graph holds it. Longer tables take several launches.
//
// Bytes: each item is read once and written once.
#include "../../common/cuda_device.h"
#include "launch.h"

namespace alignops::speculative::cuda {
namespace {

using alignops::cuda::run;
using alignops::cuda::smaller;

constexpr int kThreads = 256;
constexpr int kBlocks = 3;  // of a multiprocessor, at least
constexpr int kHeld = 4;    // words of a thread: with these blocks, 48 KiB are on their way
constexpr int kSmallTable = 32;
constexpr int kLargeTable = 192;
constexpr int64_t kPieceBytes = 64 * 1024;

// Whether [start, start + count) lies in [0, limit).
__device__ __forceinline__ bool fits(int64_t start, int64_t count, int64_t limit) {
  return start >= 0 && count >= 0 && count <= limit && start <= limit - count;
}

// A tensor of a cache, strides in bytes.
struct Side {
  char* data;
  int64_t row, head, slot;
  int64_t rows, slots;

  __device__ char* at(int64_t r, int64_t h, int64_t s) const {
    return data + r * row + h * head + s * slot;
  }
};

// Two tensors, the same one in place, and the blocks that work on them: a block for each row of the
// plan, head and piece.
struct Entry {
  Side from, to;
  int64_t first_block;
  int32_t heads, pieces;
  int32_t words, word;  // words of an item; bytes of a word, 1 to 16
};

template <int kSize>
struct Table {
  Entry entries[kSize];
  int32_t size;
};

struct Place {
  int64_t row;
  int32_t head, piece;
};

template <int kSize>
__device__ const Entry& find(const Table<kSize>& table, Place& place) {
  const auto block = static_cast<int64_t>(blockIdx.x);
  int low = 0, high = table.size - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Entry& entry = table.entries[low];
  const auto local = static_cast<uint32_t>(block - entry.first_block);
  const auto pieces = static_cast<uint32_t>(entry.pieces);
  const auto heads = static_cast<uint32_t>(entry.heads);
  place.piece = static_cast<int32_t>(local % pieces);
  place.head = static_cast<int32_t>(local / pieces % heads);
  place.row = static_cast<int64_t>(local / pieces / heads);
  return entry;
}

// Lists of items in walking order: whether the i-th one moves, where it comes from and goes.

struct Run {
  const char* source;
  char* target;
  int64_t source_step, target_step;

  __device__ bool moves(int64_t) const { return true; }
  __device__ const char* from(int64_t i) const { return source + i * source_step; }
  __device__ char* to(int64_t i) const { return target + i * target_step; }
};

// Slots [from_slot, from_slot + count) of `from` to to_slot of `to`; the last one first if
// backward.
__device__ __forceinline__ Run make_run(const Entry& entry, const Place& place, int64_t from_row,
                                        int64_t from_slot, int64_t to_row, int64_t to_slot,
                                        int64_t count, bool backward) {
  const int64_t first = backward ? count - 1 : 0, sign = backward ? -1 : 1;
  return {entry.from.at(from_row, place.head, from_slot + first),
          entry.to.at(to_row, place.head, to_slot + first), sign * entry.from.slot,
          sign * entry.to.slot};
}

// Slots of a row that a path names; `begin` is the row's in the path. A node that is not there, or
// is where it goes, does not move.
struct Listed {
  Side cache;
  int64_t row, head, base, begin, slots;
  Ints path;

  __device__ int64_t slot(int64_t i) const { return base + path[begin + i]; }
  __device__ bool moves(int64_t i) const {
    const int64_t node = path[begin + i];
    return node > i && node < slots - base;
  }
  __device__ const char* from(int64_t i) const { return cache.at(row, head, slot(i)); }
  __device__ char* to(int64_t i) const { return cache.at(row, head, base + i); }
};

// The same where slots lie in pages, those of the row from `table_begin` on. It has fewer than 2^31
// slots.
struct ListedInPages {
  Listed list;
  Ints table;
  int64_t table_begin, pages;
  uint32_t page;  // slots of one

  __device__ int64_t page_of(int64_t slot) const {
    return table[table_begin + static_cast<uint32_t>(slot) / page];
  }
  __device__ char* at(int64_t slot) const {
    return list.cache.at(page_of(slot), list.head, static_cast<uint32_t>(slot) % page);
  }
  __device__ bool moves(int64_t i) const {
    return list.moves(i) && fits(page_of(list.slot(i)), 1, pages) &&
           fits(page_of(list.base + i), 1, pages);
  }
  __device__ const char* from(int64_t i) const { return at(list.slot(i)); }
  __device__ char* to(int64_t i) const { return at(list.base + i); }
};

template <class Word, bool kInPlace, class Items>
__device__ __forceinline__ void move_words(const Items& items, int64_t begin, int64_t end,
                                           int32_t words) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int64_t total = (end - begin) * words;
  const int32_t item_step = kThreads / words, word_step = kThreads % words;
  int64_t item = begin + thread / words;
  int32_t word = thread % words;
  const auto advance = [&](int64_t& i, int32_t& w) {
    i += item_step;
    w += word_step;
    if (w >= words) {
      w -= words;
      ++i;
    }
  };
  for (int64_t done = thread; done - thread < total; done += kThreads * kHeld) {
    Word held[kHeld] = {};
    int64_t i = item;
    int32_t w = word;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (done + h * kThreads < total && items.moves(i))
        held[h] = reinterpret_cast<const Word*>(items.from(i))[w];
      advance(i, w);
    }
    if (kInPlace) __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (done + h * kThreads < total && items.moves(item))
        reinterpret_cast<Word*>(items.to(item))[word] = held[h];
      advance(item, word);
    }
  }
}

// Calls body(word) with a word of the width of the entry's.
template <class Body>
__device__ __forceinline__ void with_word(const Entry& entry, const Body& body) {
  switch (entry.word) {
    case 16:
      return body(uint4{});
    case 8:
      return body(uint2{});
    case 4:
      return body(uint32_t{});
    case 2:
      return body(uint16_t{});
    default:
      return body(uint8_t{});
  }
}

// Items [begin, end).
template <bool kInPlace, class Items>
__device__ __forceinline__ void move_items(const Entry& entry, const Items& items, int64_t begin,
                                           int64_t end) {
  with_word(entry, [&](auto word) {
    move_words<decltype(word), kInPlace>(items, begin, end, entry.words);
  });
}

// The block's piece of `count` slots, out of place.
__device__ void copy_piece(const Entry& entry, const Place& place, int64_t from_row,
                           int64_t from_slot, int64_t to_slot, int64_t count, int64_t to_row) {
  const int64_t per_piece = (count + entry.pieces - 1) / entry.pieces;
  const int64_t begin = smaller(place.piece * per_piece, count);
  move_items<false>(entry,
                    make_run(entry, place, from_row, from_slot, to_row, to_slot, count, false),
                    begin, smaller(begin + per_piece, count));
}

// What each plan does to the strip of a block.

__device__ void apply(const Shift& plan, const Entry& entry, const Place& place) {
  const int64_t row = place.row, slots = entry.from.slots;
  const int64_t src = plan.src[row], dst = plan.dst[row], count = plan.length[row];
  if (src == dst || (plan.rows && plan.rows[row] != row)) return;
  if (!fits(src, count, slots) || !fits(dst, count, slots)) return;
  move_items<true>(entry, make_run(entry, place, row, src, row, dst, count, dst > src), 0, count);
}

__device__ void apply(const GatherPlan& plan, const Entry& entry, const Place& place) {
  const int64_t row = plan.rows[place.row];
  int64_t src = 0, dst = 0, count = entry.from.slots;
  if (plan.length) {
    src = plan.src[place.row];
    dst = plan.dst[place.row];
    count = plan.length[place.row];
  }
  if (!fits(row, 1, entry.from.rows) || !fits(src, count, entry.from.slots) ||
      !fits(dst, count, entry.to.slots))
    return;
  copy_piece(entry, place, row, src, dst, count, place.row);
}

__device__ void apply(const Append& plan, const Entry& entry, const Place& place) {
  const int64_t dst = plan.lens[place.row];
  const int64_t count = plan.counts ? plan.counts[place.row] : entry.from.slots;
  if (!fits(0, count, entry.from.slots) || !fits(dst, count, entry.to.slots)) return;
  copy_piece(entry, place, place.row, 0, dst, count, place.row);
}

__device__ void apply(const TreePlan& plan, const Entry& entry, const Place& place) {
  const int64_t row = place.row, slots = entry.from.slots;
  const int64_t base = plan.base[row], count = plan.length[row];
  if (!fits(0, count, plan.nodes) || !fits(base, count, slots)) return;
  const Listed items{entry.from, row, place.head, base, row * plan.nodes, slots, plan.path};
  move_items<true>(entry, items, 0, count);
}

struct PagedTree {
  TreePlan tree;
  Pages pages;
};

__device__ void apply(const PagedTree& plan, const Entry& entry, const Place& place) {
  const TreePlan& tree = plan.tree;
  const int64_t row = place.row, slots = plan.pages.per_row * plan.pages.page;
  const int64_t base = tree.base[row], count = tree.length[row];
  if (!fits(0, count, tree.nodes) || !fits(base, count, slots)) return;
  const Listed items{entry.from, row, place.head, base, row * tree.nodes, slots, tree.path};
  const auto page = static_cast<uint32_t>(plan.pages.page);
  move_items<true>(
      entry,
      ListedInPages{items, plan.pages.table, row * plan.pages.per_row, plan.pages.count, page}, 0,
      count);
}

struct Row {
  int64_t src, dst, count;
};

__device__ __forceinline__ Row packed_row(const Packed& plan, const Entry& entry, int64_t row) {
  const int64_t src = plan.cu[row], src_end = plan.cu[row + 1];
  const int64_t dst = plan.new_cu[row], dst_end = plan.new_cu[row + 1];
  const bool good = src >= 0 && src <= src_end && src_end <= entry.from.slots && dst >= 0 &&
                    dst <= dst_end && dst_end <= entry.to.slots;
  if (!good) return {0, 0, 0};
  return {src, dst, smaller(src_end - src, dst_end - dst)};
}

__device__ void apply(const Packed& plan, const Entry& entry, const Place& place) {
  const Row row = packed_row(plan, entry, place.row);
  copy_piece(entry, place, 0, row.src, row.dst, row.count, 0);
}

// A block for all rows: one may go where the one before it lay.
struct PackedInPlace {
  Packed plan;
};

__device__ void apply(const PackedInPlace& args, const Entry& entry, const Place& place) {
  with_word(entry, [&](auto word) {
    for (int64_t r = 0; r < args.plan.rows; ++r) {
      const Row row = packed_row(args.plan, entry, r);
      if (row.src == row.dst) continue;
      move_words<decltype(word), true>(
          make_run(entry, place, 0, row.src, 0, row.dst, row.count, false), 0, row.count,
          entry.words);
    }
  });
}

// Paths through pages take more registers and move little.
template <class Plan>
constexpr int kBlocksOf = kBlocks;
template <>
inline constexpr int kBlocksOf<PagedTree> = 2;

template <int kSize, class Plan>
__global__ void __launch_bounds__(kThreads, kBlocksOf<Plan>)
    move_kernel(const __grid_constant__ Table<kSize> table, const Plan plan) {
  Place place{};
  const Entry& entry = find(table, place);
  apply(plan, entry, place);
}

// Bytes that all addresses and sizes are a multiple of, up to 16.
int32_t word_bytes(const CacheTensor& t) {
  const auto all = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(t.data)) |
                   static_cast<uint64_t>(t.row_stride | t.head_stride | t.slot_stride | t.bytes);
  int32_t word = 16;
  while ((all & static_cast<uint64_t>(word - 1)) != 0) word /= 2;
  return word;
}

Side side(const CacheTensor& t) {
  return {t.data, t.row_stride, t.head_stride, t.slot_stride, t.rows, t.slots};
}

template <int kSize, class Plan>
cudaError_t launch_table(const char* name, const Entry* entries, int64_t size, int64_t grid,
                         const Plan& plan, Launch& launch) {
  Table<kSize> table;
  table.size = static_cast<int32_t>(size);
  for (int64_t i = 0; i < size; ++i) {
    table.entries[i] = entries[i];
    table.entries[i].first_block -= entries[0].first_block;
  }
  return run(launch, name, move_kernel<kSize, Plan>, grid, kThreads, table, plan);
}

// Blocks for `rows` rows of the plan, the heads of each tensor, and pieces if they may be cut.
template <class Plan>
cudaError_t launch_moves(const char* name, const std::vector<CacheTensor>& from,
                         const std::vector<CacheTensor>& to, int64_t rows, bool cut,
                         const Plan& plan, Launch& launch) {
  std::vector<Entry> entries;
  int64_t blocks = 0;
  for (size_t i = 0; i < from.size(); ++i) {
    if (rows == 0 || from[i].empty() || to[i].empty()) continue;
    const int64_t bytes = smaller(from[i].slots, to[i].slots) * from[i].bytes;
    const int64_t pieces = cut ? alignops::cuda::blocks(bytes, kPieceBytes) : 1;
    const int32_t a = word_bytes(from[i]), b = word_bytes(to[i]), word = a < b ? a : b;
    entries.push_back({side(from[i]), side(to[i]), blocks, static_cast<int32_t>(from[i].heads),
                       static_cast<int32_t>(pieces), static_cast<int32_t>(from[i].bytes / word),
                       word});
    blocks += rows * from[i].heads * pieces;
  }
  const auto count = static_cast<int64_t>(entries.size());
  if (count == 0) return cudaSuccess;
  for (int64_t begin = 0; begin < count; begin += kLargeTable) {
    const int64_t size = smaller(count - begin, kLargeTable);
    const int64_t end = begin + size < count ? entries[begin + size].first_block : blocks;
    const int64_t grid = end - entries[begin].first_block;
    const cudaError_t error =
        size <= kSmallTable
            ? launch_table<kSmallTable>(name, &entries[begin], size, grid, plan, launch)
            : launch_table<kLargeTable>(name, &entries[begin], size, grid, plan, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int64_t rows_of(const std::vector<CacheTensor>& tensors) {
  return tensors.empty() ? 0 : tensors[0].rows;
}

}  // namespace

cudaError_t shift(const std::vector<CacheTensor>& caches, const Shift& plan, Launch& launch) {
  return launch_moves("kv_shift", caches, caches, rows_of(caches), false, plan, launch);
}

cudaError_t gather(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
                   const GatherPlan& plan, Launch& launch) {
  if (!plan.in_place) return launch_moves("kv_gather", from, to, plan.count, true, plan, launch);
  if (!plan.length) return cudaSuccess;
  return shift(to, {plan.src, plan.dst, plan.length, plan.rows}, launch);
}

cudaError_t append(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
                   const Append& plan, Launch& launch) {
  return launch_moves("ragged_append", from, to, rows_of(to), true, plan, launch);
}

cudaError_t tree(const std::vector<CacheTensor>& caches, const TreePlan& plan, Launch& launch) {
  return launch_moves("kv_tree", caches, caches, plan.rows, false, plan, launch);
}

cudaError_t paged_tree(const std::vector<CacheTensor>& caches, const TreePlan& plan,
                       const Pages& pages, Launch& launch) {
  return launch_moves("kv_paged_tree", caches, caches, plan.rows, false, PagedTree{plan, pages},
                      launch);
}

cudaError_t packed(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
                   const Packed& plan, Launch& launch) {
  if (plan.in_place)
    return launch_moves("kv_packed", from, to, 1, false, PackedInPlace{plan}, launch);
  return launch_moves("kv_packed", from, to, plan.rows, true, plan, launch);
}

}  // namespace alignops::speculative::cuda
