// Searches in the suffix array of a shard that lies on the device, with the answers of the CPU.
//
// A query is a piece of a row, followed by a candidate or not. The bucket of its first token is
// halved as often as the largest bucket could be: the same number of steps for all threads.
// Suffixes between two neighbours agree with the query in as many tokens as both of these do, so a
// comparison starts behind them.
//
// find and next_counts: a thread per answer. peek: a warp per candidate; its lanes try 32 lengths
// of the suffix at once, which cuts the range of lengths to a 32nd, and whether a length occurs is
// monotone. A step waits for two reads, SUF and the text there; other warps fill the time.
//
// Sums of surprisals are added in order, from the first token of the row, as on the CPU: bit for
// bit the same.
#include "../../common/cuda_device.h"
#include "launch.h"

namespace alignops::spans::cuda {
namespace {

using alignops::cuda::blocks;
using alignops::cuda::clamp;
using alignops::cuda::run;

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // of a multiprocessor, at least: leaves registers for all
constexpr int kLanes = 32;

__device__ __forceinline__ uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

// Tokens [begin, end) of the rows, then `last` if it is there.
struct Query {
  const int64_t* tokens;
  int64_t begin, end;
  int64_t last;
  bool has_last;

  __device__ uint64_t length() const { return static_cast<uint64_t>(end - begin + has_last); }
  __device__ uint64_t operator[](uint64_t i) const {
    const int64_t place = begin + static_cast<int64_t>(i);
    return static_cast<uint64_t>(place < end ? tokens[place] : last);
  }
};

__device__ __forceinline__ Query row_of(const RowArgs& args, int64_t row) {
  const int64_t begin = clamp(args.offsets[row], 0, args.total);
  return {args.tokens, begin, clamp(args.offsets[row + 1], begin, args.total), 0, false};
}

struct Interval {
  uint64_t lo, hi;
};

template <class Token>
class Search {
 public:
  __device__ Search(const Shard& shard, int steps) : shard_(shard), steps_(steps) {}

  __device__ Interval interval(const Query& query) const {
    if (query.length() == 0) return {0, shard_.suf_size};
    const Interval all = bucket(query[0]);
    if (query.length() == 1) return all;
    const uint64_t lo = bound<false>(query, all);
    return {lo, bound<true>(query, {lo, all.hi})};
  }

  __device__ bool occurs(const Query& query) const {
    const Interval all = bucket(query[0]);
    const uint64_t lo = bound<false>(query, all);
    uint64_t lcp = 0;
    return lo < all.hi && order(query, position(lo), lcp) == 0;
  }

 private:
  __device__ Interval bucket(uint64_t token) const {
    if (token >= shard_.vocab) return {shard_.suf_size, shard_.suf_size};
    const uint64_t lo = smaller(shard_.first[token], shard_.suf_size);
    const uint64_t hi = smaller(shard_.first[token + 1], shard_.suf_size);
    return {lo, lo < hi ? hi : lo};
  }

  __device__ uint64_t position(uint64_t rank) const {
    if (shard_.pointer_bytes == 4) return static_cast<const uint32_t*>(shard_.suf)[rank];
    const uint8_t* bytes = static_cast<const uint8_t*>(shard_.suf) + 5 * rank;
    uint64_t value = 0;
    for (int i = 0; i < 5; ++i) value |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    return value;
  }

  // Of the suffix at a position, which agrees with the query in `lcp` tokens: -1 if it is less, 0
  // if it starts with the query, 1 if it is greater. The end of the text is less than any token.
  __device__ int order(const Query& query, uint64_t place, uint64_t& lcp) const {
    for (; lcp < query.length(); ++lcp) {
      const uint64_t wanted = query[lcp];
      if (place + lcp >= shard_.text_size || wanted >= shard_.vocab) return -1;
      const uint64_t token = static_cast<const Token*>(shard_.text)[place + lcp];
      if (token != wanted) return token < wanted ? -1 : 1;
    }
    return 0;
  }

  // The first rank inside whose suffix is not less than the query; kAfter: is greater.
  template <bool kAfter>
  __device__ uint64_t bound(const Query& query, Interval inside) const {
    uint64_t lo = inside.lo, hi = inside.hi, lcp_lo = 0, lcp_hi = 0;
    for (int step = 0; step < steps_; ++step) {
      if (lo >= hi) continue;
      const uint64_t rank = lo + (hi - lo) / 2;
      uint64_t lcp = smaller(lcp_lo, lcp_hi);
      const int found = order(query, position(rank), lcp);
      if (kAfter ? found <= 0 : found < 0) {
        lo = rank + 1;
        lcp_lo = lcp;
      } else {
        hi = rank;
        lcp_hi = lcp;
      }
    }
    return lo;
  }

  const Shard& shard_;
  int steps_;
};

template <class Token>
__global__ void __launch_bounds__(kThreads, kBlocks)
    find_kernel(const RowArgs args, const int steps, int64_t* intervals) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= args.rows) return;
  const Interval found = Search<Token>(args.index, steps).interval(row_of(args, row));
  intervals[2 * row] = static_cast<int64_t>(found.lo);
  intervals[2 * row + 1] = static_cast<int64_t>(found.hi);
}

template <class Token>
__global__ void __launch_bounds__(kThreads, kBlocks)
    next_counts_kernel(const RowArgs args, const int steps, const int64_t* candidates,
                       const int64_t width, int64_t* counts) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= args.rows * width) return;
  Query query = row_of(args, item / width);
  query.last = candidates[item];
  query.has_last = true;
  const Interval found = Search<Token>(args.index, steps).interval(query);
  counts[item] = static_cast<int64_t>(found.hi - found.lo);
}

template <class Token>
__global__ void __launch_bounds__(kThreads, kBlocks)
    peek_kernel(const RowArgs rows, const int steps, const PeekArgs args) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) +
                       static_cast<int64_t>(threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  if (item >= rows.rows * args.width) return;
  const Query row = row_of(rows, item / args.width);
  Query query = row;
  query.last = args.candidates[item];
  query.has_last = true;
  const Search<Token> search(rows.index, steps);

  // Suffixes of `known` tokens occur, those longer than `most` do not.
  int64_t known = 0, most = row.end - row.begin + 1;
  while (known < most) {
    const int64_t base = known, range = most - known;
    const auto tried = [&](int64_t n) {  // the n-th length, 1 to 32
      return base + (range <= kLanes ? n : (range * n + kLanes - 1) / kLanes);
    };
    const int64_t mine = tried(lane + 1);
    query.begin = row.end + 1 - mine;
    const unsigned lanes = __ballot_sync(0xffffffffu, mine <= most && search.occurs(query));
    int found = 0;  // the first lanes find something, the others do not
    while (found < kLanes && (lanes >> found & 1) != 0) ++found;
    if (found > 0) known = tried(found);
    if (found < kLanes && tried(found + 1) <= most) most = tried(found + 1) - 1;
  }
  query.begin = row.end + 1 - known;
  Interval found{0, rows.index.suf_size};
  if (known > 0) found = search.interval(query);

  double sum = 0, before = 0;
  for (int64_t place = row.begin; place < row.end; ++place) {
    if (place == query.begin) before = sum;
    const auto token = static_cast<uint64_t>(rows.tokens[place]);
    if (token < rows.index.vocab) sum += args.surprisal[token];
  }
  if (query.begin == row.end) before = sum;
  const auto last = static_cast<uint64_t>(query.last);
  const double bci = known > 0 && last < rows.index.vocab ? sum + args.surprisal[last] - before : 0;
  if (lane != 0) return;
  const auto count = static_cast<int64_t>(found.hi - found.lo);
  args.flag[item] = known >= args.min_len && count <= args.max_count && bci > args.tau;
  args.length[item] = known;
  args.count[item] = count;
  args.bci[item] = bci;
}

// Halvings that leave nothing of any bucket.
int search_steps(const Shard& shard) {
  int steps = 0;
  for (uint64_t left = shard.suf_size; left > 0; left /= 2) ++steps;
  return steps;
}

// Calls body(token) with a token of the width of the text.
template <class Body>
cudaError_t with_token(const Shard& shard, const Body& body) {
  if (shard.token_bytes == 1) return body(uint8_t{});
  if (shard.token_bytes == 2) return body(uint16_t{});
  return body(uint32_t{});
}

}  // namespace

cudaError_t find(const RowArgs& args, int64_t* intervals, Launch& launch) {
  return with_token(args.index, [&](auto token) {
    return run(launch, "spans_find", find_kernel<decltype(token)>, blocks(args.rows, kThreads),
               kThreads, args, search_steps(args.index), intervals);
  });
}

cudaError_t next_counts(const RowArgs& args, const int64_t* candidates, int64_t width,
                        int64_t* counts, Launch& launch) {
  return with_token(args.index, [&](auto token) {
    return run(launch, "spans_next_counts", next_counts_kernel<decltype(token)>,
               blocks(args.rows * width, kThreads), kThreads, args, search_steps(args.index),
               candidates, width, counts);
  });
}

cudaError_t peek(const RowArgs& rows, const PeekArgs& args, Launch& launch) {
  return with_token(rows.index, [&](auto token) {
    return run(launch, "spans_peek", peek_kernel<decltype(token)>,
               blocks(rows.rows * args.width, kThreads / kLanes), kThreads, rows,
               search_steps(rows.index), args);
  });
}

}  // namespace alignops::spans::cuda
