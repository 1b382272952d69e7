// Positions, masks and tree tables on a GPU, with the results of the CPU (layout.h).
//
// A mask: a block writes 1024 slots of one line, the slots that one query sees. What does not
// depend on the slot is computed once per thread; consecutive threads write consecutive elements,
// or a warp the 32 bits of a word. Trees: a block per row, a thread per node or candidate. Sums and
// maxima over rows: one block, since there are few rows.
//
// Bytes: a mask is written once; everything else is tiny.
#include "../../common/cuda_device.h"
#include "launch.h"

namespace alignops::speculative::cuda {
namespace {

using alignops::cuda::blocks;
using alignops::cuda::larger;
using alignops::cuda::run;
using alignops::cuda::smaller;

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int64_t kLineSlots = 4 * kThreads;
constexpr int kWindows = 8;  // of one launch

// Positions

__global__ void __launch_bounds__(kThreads)
    query_positions_kernel(const Queries queries, int64_t* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= queries.rows * queries.columns) return;
  const int64_t row = i / queries.columns, column = i % queries.columns;
  out[i] = column < queries.count(row) ? queries.position(row, column) : 0;
}

__global__ void __launch_bounds__(kThreads)
    column_positions_kernel(const Ints content, const Ints pad, const int64_t rows,
                            const int64_t columns, int64_t* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * columns) return;
  const int64_t row = i / columns, position = i % columns - pad[row];
  out[i] = position >= 0 && position < content[row] ? position : 0;
}

// Masks

struct Windows {
  int64_t size[kWindows];
};

// What the query of a line sees.
class Sight {
 public:
  // A line of a mask with a line per query.
  __device__ Sight(const MaskArgs& args, int64_t row, int64_t column, int64_t window)
      : args_(args), row_(row), column_(column), window_(window), first_(args.first_slot(row)) {
    const Queries& queries = args.queries;
    padding_ = column >= queries.count(row);
    if (padding_) {
      first_ = smaller(first_ + column, args.slots - 1);
      return;
    }
    position_ = queries.position(row, column);
    see_committed();
    if (args.ancestors) {
      bits_ = static_cast<uint64_t>(
          args.ancestors[args.ancestors_shared ? column : row * queries.columns + column]);
    }
  }

  // The line of a row: committed tokens and all queries.
  __device__ Sight(const MaskArgs& args, int64_t row)
      : args_(args),
        row_(row),
        column_(args.queries.count(row) - 1),
        window_(0),
        first_(args.first_slot(row)) {
    see_committed();
  }

  __device__ bool operator()(int64_t slot) const {
    if (padding_) return slot == first_;
    return committed(slot) || query(slot - first_);
  }

 private:
  __device__ void see_committed() {
    end_ = args_.queries.content[row_] - 1;
    begin_ = window_ > 0 ? larger(0, position_ - window_ + 1) : 0;
    pad_ = args_.pad ? args_.pad[row_] : 0;
  }
  __device__ bool committed(int64_t slot) const {
    int64_t position = slot - pad_;
    if (args_.positions) {
      // The slots of the queries hold nothing else, whatever the positions say of them.
      if (slot >= first_ && slot < first_ + args_.queries.columns) return false;
      position = args_.positions[row_ * args_.slots + slot];
    }
    return position >= begin_ && position < end_;
  }
  __device__ bool query(int64_t i) const {
    if (i < 0 || i > column_) return false;
    if (bits_ == 0) return window_ == 0 || column_ - i < window_;
    return (bits_ >> (i & 63) & 1) != 0 &&
           (window_ == 0 || position_ - args_.queries.position(row_, i) < window_);
  }

  const MaskArgs& args_;
  int64_t row_, column_, window_, first_;
  int64_t position_ = 0, begin_ = 0, end_ = 0, pad_ = 0;
  uint64_t bits_ = 0;  // 0: a chain
  bool padding_ = false;
};

__device__ __forceinline__ Sight sight_of(const MaskArgs& args, const Windows& windows,
                                          int64_t line) {
  if (args.kind == MaskKind::kRow) return {args, line};
  const int64_t column = line % args.queries.columns, above = line / args.queries.columns;
  return {args, above % args.queries.rows, column, windows.size[above / args.queries.rows]};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(const __grid_constant__ MaskArgs args, const Windows windows, const int64_t pieces,
                T* out) {
  const auto block = static_cast<int64_t>(blockIdx.x);
  const int64_t line = block / pieces, begin = block % pieces * kLineSlots;
  const Sight sees = sight_of(args, windows, line);
  const auto hidden = static_cast<T>(args.hidden);
  const T shown = args.kind == MaskKind::kAdditive ? T{0} : T{1};
  const int64_t end = smaller(begin + kLineSlots, args.slots);
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += kThreads)
    out[line * args.slots + slot] = sees(slot) ? shown : hidden;
}

__global__ void __launch_bounds__(kThreads)
    bit_mask_kernel(const __grid_constant__ MaskArgs args, const Windows windows,
                    const int64_t pieces, uint32_t* out) {
  const auto block = static_cast<int64_t>(blockIdx.x);
  const int64_t line = block / pieces, begin = block % pieces * kLineSlots;
  const int64_t words = (args.slots + kLanes - 1) / kLanes;
  const Sight sees = sight_of(args, windows, line);
  for (int64_t base = begin; base < begin + kLineSlots; base += kThreads) {
    const int64_t slot = base + threadIdx.x, word = slot / kLanes;
    const uint32_t bits = __ballot_sync(0xffffffffu, slot < args.slots && sees(slot));
    if (slot % kLanes == 0 && word < words) out[line * words + word] = bits;
  }
}

// Over rows

// Inclusive sums of two numbers of each thread of the block.
__device__ void scan(int64_t (&a)[kThreads], int64_t (&b)[kThreads]) {
  const auto thread = static_cast<int>(threadIdx.x);
  for (int step = 1; step < kThreads; step *= 2) {
    const int64_t left_a = thread >= step ? a[thread - step] : 0;
    const int64_t left_b = thread >= step ? b[thread - step] : 0;
    __syncthreads();
    a[thread] += left_a;
    b[thread] += left_b;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    offsets_kernel(const Queries queries, int32_t* query_offsets, int32_t* slot_offsets) {
  __shared__ int64_t counts[kThreads], slots[kThreads];
  const auto thread = static_cast<int>(threadIdx.x);
  int64_t all_counts = 0, all_slots = 0;
  if (thread == 0) query_offsets[0] = slot_offsets[0] = 0;
  for (int64_t begin = 0; begin < queries.rows; begin += kThreads) {
    const int64_t row = begin + thread;
    const int64_t count = row < queries.rows ? queries.count(row) : 0;
    counts[thread] = count;
    slots[thread] = count == 0 ? 0 : queries.content[row] - 1 + count;
    __syncthreads();
    scan(counts, slots);
    if (row < queries.rows) {
      query_offsets[row + 1] = static_cast<int32_t>(all_counts + counts[thread]);
      slot_offsets[row + 1] = static_cast<int32_t>(all_slots + slots[thread]);
    }
    all_counts += counts[kThreads - 1];
    all_slots += slots[kThreads - 1];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) plan_realign_kernel(const Realign args) {
  __shared__ int64_t widths[kThreads];
  const auto thread = static_cast<int>(threadIdx.x);
  int64_t width = 0;
  for (int64_t row = thread; row < args.rows; row += kThreads)
    width = larger(width, args.content[row] + args.emitted[row]);
  widths[thread] = width;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (thread < step) widths[thread] = larger(widths[thread], widths[thread + step]);
    __syncthreads();
  }
  for (int64_t row = thread; row < args.rows; row += kThreads) {
    const int64_t content = args.content[row] + args.emitted[row];
    const auto pad = static_cast<int32_t>(widths[0] - content);
    args.src[row] = static_cast<int32_t>(args.pad[row]);
    args.dst[row] = args.new_pad[row] = pad;
    args.length[row] = static_cast<int32_t>(larger(content - 1, 0));
  }
}

// Trees

__global__ void __launch_bounds__(kMaxNodes) tree_kernel(const TreeTables tables) {
  __shared__ int32_t parents[kMaxNodes];
  const int64_t n = tables.nodes, row = static_cast<int64_t>(blockIdx.x);
  const auto node = static_cast<int>(threadIdx.x);
  if (node < n) {
    const int64_t parent = tables.parent[row * n + node];
    parents[node] = parent >= 0 && parent < node ? static_cast<int32_t>(parent) : -1;
  }
  __syncthreads();
  if (node >= n) return;
  int32_t depth = 0;
  uint64_t ancestors = UINT64_C(1) << node;
  for (int32_t above = parents[node]; above >= 0; above = parents[above]) {
    ++depth;
    ancestors |= UINT64_C(1) << above;
  }
  int32_t child = -1, sibling = -1;
  for (auto other = static_cast<int32_t>(n) - 1; other > node; --other) {
    if (parents[other] == node) child = other;
    if (parents[node] >= 0 && parents[other] == parents[node]) sibling = other;
  }
  tables.depth[row * n + node] = depth;
  tables.ancestors[row * n + node] = static_cast<int64_t>(ancestors);
  tables.first_child[row * n + node] = child;
  tables.next_sibling[row * n + node] = sibling;
  for (int64_t i = 0; i < n; ++i)
    tables.block[(row * n + node) * n + i] = (ancestors >> i & 1) != 0;
}

// Whether candidate a is better than candidate b of the same row.
__device__ bool better(const TreeSelection& s, int64_t row, int64_t a, int64_t b) {
  const double x = s.score(row * s.candidates + a), y = s.score(row * s.candidates + b);
  if (x != x || y != y) return (x == x) != (y == y) ? x == x : a < b;
  return x != y ? x > y : a < b;
}

__global__ void __launch_bounds__(kThreads) select_kernel(const TreeSelection s) {
  __shared__ int32_t chosen[kMaxNodes];
  const auto row = static_cast<int64_t>(blockIdx.x);
  const auto thread = static_cast<int>(threadIdx.x);
  for (int64_t candidate = thread; candidate < s.candidates; candidate += kThreads) {
    int64_t rank = 0;
    for (int64_t other = 0; other < s.candidates && rank < s.best; ++other)
      if (other != candidate && better(s, row, other, candidate)) ++rank;
    if (rank < s.best) chosen[rank] = static_cast<int32_t>(candidate);
  }
  __syncthreads();
  if (thread == 0) s.parent[row * (s.best + 1)] = -1;
  if (thread >= s.best) return;
  const int32_t candidate = chosen[thread];
  const int64_t parent = s.parents[row * s.candidates + candidate];
  int32_t place = 0, above = 0;
  bool found = false;
  for (int64_t i = 0; i < s.best; ++i) {
    if (chosen[i] < candidate) ++place;
    if (chosen[i] < parent) ++above;
    found = found || (chosen[i] == parent && parent < candidate);
  }
  s.nodes[row * s.best + place] = candidate;
  s.parent[row * (s.best + 1) + place + 1] = found ? above + 1 : 0;
}

template <class T>
cudaError_t launch_mask(const MaskArgs& args, const Windows& windows, int64_t lines, int64_t done,
                        Launch& launch) {
  const int64_t pieces = blocks(args.slots, kLineSlots);
  return run(launch, "mask", mask_kernel<T>, lines * pieces, kThreads, args, windows, pieces,
             static_cast<T*>(args.out) + done * args.slots);
}

cudaError_t launch_lines(const MaskArgs& args, const Windows& windows, int64_t lines, int64_t done,
                         Launch& launch) {
  if (args.kind == MaskKind::kBits) {
    const int64_t pieces = blocks(args.slots, kLineSlots), words = blocks(args.slots, kLanes);
    return run(launch, "mask", bit_mask_kernel, lines * pieces, kThreads, args, windows, pieces,
               static_cast<uint32_t*>(args.out) + done * words);
  }
  switch (args.element) {
    case 1:
      return launch_mask<uint8_t>(args, windows, lines, done, launch);
    case 2:
      return launch_mask<uint16_t>(args, windows, lines, done, launch);
    case 4:
      return launch_mask<uint32_t>(args, windows, lines, done, launch);
    default:
      return launch_mask<uint64_t>(args, windows, lines, done, launch);
  }
}

}  // namespace

cudaError_t query_positions(const Queries& queries, int64_t* out, Launch& launch) {
  return run(launch, "positions", query_positions_kernel,
             blocks(queries.rows * queries.columns, kThreads), kThreads, queries, out);
}

cudaError_t column_positions(const Ints& content, const Ints& pad, int64_t rows, int64_t columns,
                             int64_t* out, Launch& launch) {
  return run(launch, "positions", column_positions_kernel, blocks(rows * columns, kThreads),
             kThreads, content, pad, rows, columns, out);
}

cudaError_t fill_mask(const MaskArgs& args, Launch& launch) {
  if (args.kind == MaskKind::kRow)
    return launch_lines(args, Windows{}, args.queries.rows, 0, launch);
  const int64_t lines = args.queries.rows * args.queries.columns;
  for (int64_t first = 0; first < args.window_count; first += kWindows) {
    Windows windows{};
    const int64_t count = smaller(args.window_count - first, kWindows);
    for (int64_t i = 0; i < count; ++i) windows.size[i] = args.windows[first + i];
    const cudaError_t error = launch_lines(args, windows, count * lines, first * lines, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t offsets(const Queries& queries, int32_t* query_offsets, int32_t* slot_offsets,
                    Launch& launch) {
  return run(launch, "offsets", offsets_kernel, 1, kThreads, queries, query_offsets, slot_offsets);
}

cudaError_t plan_realign(const Realign& args, Launch& launch) {
  return run(launch, "plan_realign", plan_realign_kernel, 1, kThreads, args);
}

cudaError_t fill_tree(const TreeTables& tables, Launch& launch) {
  return run(launch, "tree_tables", tree_kernel, tables.rows, static_cast<int>(kMaxNodes), tables);
}

cudaError_t select_tree(const TreeSelection& selection, Launch& launch) {
  return run(launch, "tree_select", select_kernel, selection.rows, kThreads, selection);
}

}  // namespace alignops::speculative::cuda
