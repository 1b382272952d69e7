#include "attention/plan_view.h"

#include <cstring>

#include "common/check.h"

namespace alignops::attention {
namespace {

constexpr int64_t kHeaderWords = sizeof(Header) / 8;

// Checks of one plan. Numbers are compared before they are added or multiplied, so that nothing
// overflows on the way.
class Checker {
 public:
  Checker(const int64_t* words, int64_t pool_pages, const char* op)
      : words_(words), pool_pages_(pool_pages), op_(op) {}

  template <class... Parts>
  void require(bool ok, const Parts&... what) const {
    ALIGNOPS_CHECK(ok, op_, ": plan must ", what...);
  }

  void number(int64_t value, int64_t low, int64_t high, const char* name) const {
    require(value >= low && value <= high, "have ", name, " in ", low, "..", high, ", got ", value);
  }

  PlanView view(int64_t count) {
    require(count >= kHeaderWords, "have at least ", kHeaderWords, " words, got ", count);
    std::memcpy(&h_, words_, sizeof h_);
    require(h_.magic == kPlanMagic, "begin with the mark of a plan of this version, got ",
            h_.magic);
    number(h_.words, kHeaderWords, count, "words");
    number(h_.workers, 0, h_.words, "workers");
    number(h_.rows, 0, h_.words, "rows");
    number(h_.segments, 0, h_.words, "segments");
    number(h_.blocks, 0, kMaxNumber, "blocks");
    number(h_.page_size, 1, 1 << 16, "page_size");
    require((h_.page_size & (h_.page_size - 1)) == 0,
            "have a page_size that is a power of two, got ", h_.page_size);
    number(h_.pages, 0, h_.words, "pages");
    number(h_.longest, 0, h_.rows, "longest");
    number(h_.tokens, 0, kMaxNumber, "tokens");
    number(h_.step, 0, 1, "step");
    number(h_.types, 0, kMaxRopeTypes, "types");
    // Below, S W is compared with words, which is far from overflow.
    require(h_.workers == 0 || h_.segments <= h_.words / h_.workers, "have room for ", h_.segments,
            " segments of ", h_.workers, " workers, got ", h_.words, " words");
    const int64_t cells = h_.segments * h_.workers;
    PlanView view{};
    view.header = h_;
    view.words = words_;
    view.row_ptr = table<int64_t>(h_.row_ptr, h_.workers + 1, "row_ptr");
    view.segments = table<Segment>(h_.segment, h_.segments, "segment");
    view.pairs = table<Pair>(h_.pair, cells, "pair");
    view.weights = table<Weight>(h_.weight, cells, "weight");
    view.pages = table<int64_t>(h_.page, h_.pages, "page");
    view.rows = table<Row>(h_.row, h_.rows, "row");
    view.ropes = table<Rope>(h_.rope, h_.types, "rope");
    rows(view);
    segments(view);
    for (int64_t i = 0; i < cells; ++i) {
      const Pair& pair = view.pairs[i];
      number(pair.state, kHidden, kRising, "state of a pair");
      number(pair.limit0, -kMaxNumber, kMaxNumber, "limit0");
      number(pair.distance0, -kMaxNumber, kMaxNumber, "distance0");
    }
    for (int64_t i = 0; i < h_.pages; ++i)
      require(view.pages[i] >= 0 && view.pages[i] < pool_pages_, "have pages below ", pool_pages_,
              " (those of the pool), got ", view.pages[i], " at ", i);
    const int64_t turns = cells + h_.longest + h_.rows;
    for (int64_t i = 0; i < h_.types; ++i) {
      number(view.ropes[i].pairs, 0, kMaxNumber, "pairs of a rope type");
      require(turns == 0 || view.ropes[i].pairs <= h_.words / turns, "have room for ", turns,
              " rotations of ", view.ropes[i].pairs, " pairs, got ", h_.words, " words");
      table<int64_t>(view.ropes[i].table, turns * view.ropes[i].pairs, "rotations");
    }
    return view;
  }

 private:
  // `count` is a checked number of at most `words`.
  template <class T>
  const T* table(int64_t offset, int64_t count, const char* name) const {
    constexpr int64_t kWords = sizeof(T) / 8;
    static_assert(sizeof(T) % 8 == 0);
    require(offset >= 0 && offset <= h_.words && count <= (h_.words - offset) / kWords,
            "hold its table ", name, " of ", count, " entries, got offset ", offset, " of ",
            h_.words, " words");
    return reinterpret_cast<const T*>(words_ + offset);
  }

  void rows(const PlanView& view) const {
    require(view.row_ptr[0] == 0 && view.row_ptr[h_.workers] == h_.rows,
            "have row_ptr from 0 to rows=", h_.rows, ", got ", view.row_ptr[0], " to ",
            view.row_ptr[h_.workers]);
    for (int64_t w = 0; w < h_.workers; ++w) {
      const int64_t first = view.row_ptr[w], end = view.row_ptr[w + 1];
      require(first <= end && end <= h_.rows && end - first <= h_.longest,
              "have a rising row_ptr with at most longest=", h_.longest, " rows each, got ", first,
              " and ", end, " at ", w);
      for (int64_t r = first; r < end; ++r) {
        const Row& row = view.rows[r];
        require(row.worker == w && row.t == r - first, "have rows in the order of row_ptr, got (",
                row.worker, ", ", row.t, ") at ", r);
        require(row.slot >= 0 && row.slot / h_.page_size < pool_pages_, "have slots of ",
                pool_pages_, " pages (those of the pool), got slot ", row.slot, " at ", r);
      }
    }
  }

  void segments(const PlanView& view) const {
    int64_t token = 0;
    for (int64_t s = 0; s < h_.segments; ++s) {
      const Segment& segment = view.segments[s];
      number(segment.block, 0, h_.blocks - 1, "block");
      number(segment.n, 1, kMaxNumber, "n");
      number(segment.first, 0, h_.page_size - 1, "first");
      number(segment.page, 0, h_.pages, "page of a segment");
      const int64_t pages = (segment.first + segment.n + h_.page_size - 1) / h_.page_size;
      require(pages <= h_.pages - segment.page, "have pages for all keys of segment ", s, ", got ",
              h_.pages - segment.page, " for ", pages);
      require(segment.token == token, "have the keys before segment ", s, " as its token=", token,
              ", got ", segment.token);
      token += segment.n;
      require(token <= h_.tokens, "have the sum of all n as tokens, got ", h_.tokens);
    }
    require(token == h_.tokens, "have the sum of all n=", token, " as tokens, got ", h_.tokens);
  }

  const int64_t* words_;
  int64_t pool_pages_;
  const char* op_;
  Header h_{};
};

}  // namespace

PlanView view_plan(const int64_t* words, int64_t count, int64_t pool_pages, const char* op) {
  return Checker(words, pool_pages, op).view(count);
}

}  // namespace alignops::attention
