// Tables of a plan from the snapshot of a step. A block's origin for an entry is the sum of the
// extents of the blocks before it, new tokens included where they are seen; the rest follows from
//
//   delta = p - origin - s0 + r0     rotation of a query at position p against a run (s0, r0)
#include "planner.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rotations.h"
#include "workspace.h"

namespace alignops::attention::store {

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

template <class T>
int64_t size(const std::vector<T>& values) {
  return static_cast<int64_t>(values.size());
}

// Words of a table entry.
template <class T>
constexpr int64_t kWords = sizeof(T) / 8;

// Copies a table and returns the offset behind it.
template <class T>
int64_t put(int64_t* out, int64_t offset, const std::vector<T>& table) {
  static_assert(sizeof(T) % 8 == 0);
  if (!table.empty()) std::memcpy(out + offset, table.data(), table.size() * sizeof(T));
  return offset + size(table) * kWords<T>;
}

}  // namespace

int64_t Write::first() const { return tail >= 0 || copy ? end : 0; }

int64_t Step::slot(const Write& write, int64_t t, int64_t page_size) const {
  const int64_t place = write.first() + t;
  const int64_t i = place / page_size - (write.tail >= 0 ? 1 : 0);
  const int64_t page = i < 0 ? write.tail : pages[at(write.pages + i)];
  return page * page_size + place % page_size;
}

Step::PageCopy Step::page_copy(const Write& write, int64_t page_size) const {
  const Run& last = write.base->runs.back();
  const int64_t begin = std::max<int64_t>(write.end - last.n, 0);
  return {last.pages(page_size).back() * page_size + begin,
          pages[at(write.pages)] * page_size + begin, write.end - begin};
}

void Step::place_blocks() {
  const int64_t count = size(entries);
  blocks.clear();
  columns_.assign(layout->blocks.size(), -1);
  for (const int64_t block : views)
    if (columns_[at(block)] < 0) {
      columns_[at(block)] = size(blocks);
      blocks.push_back(block);
    }
  writers_.assign(blocks.size(), -1);
  for (int64_t e = 0; e < count; ++e)
    if (entries[at(e)].write >= 0)
      writers_[at(columns_[at(writes[at(entries[at(e)].write)].block)])] = e;

  places_.assign(blocks.size() * entries.size(), {false, 0, 1, 0});
  own_origins_.assign(entries.size(), 0);
  for (int64_t e = 0; e < count; ++e) {
    const Entry& entry = entries[at(e)];
    int64_t origin = 0;
    for (int64_t i = entry.view; i < entry.view + entry.blocks; ++i) {
      const int64_t block = views[at(i)], column = columns_[at(block)];
      places_[at(column * count + e)] = {entry.rows > 0, 0, 1, origin};
      own_origins_[at(e)] = origin;
      const int64_t writer = writers_[at(column)];
      origin += layout->blocks[at(block)]->extent +
                (writer >= 0 && !lagged ? entries[at(writer)].rows : 0);
    }
    if (entry.worker < 0) continue;
    for (const Knob& knob : layout->workers[at(entry.worker)]->knobs) {
      const int64_t column = columns_[at(knob.block)];
      if (column < 0) continue;
      Place& place = places_[at(column * count + e)];
      place.bias = knob.bias;
      place.gain = knob.gain;
      place.seen = place.seen && !(std::isinf(knob.bias) && knob.bias < 0);
    }
  }
}

void Step::tabulate(const Form& form, int64_t page_size) {
  place_blocks();
  segments_.clear();
  pairs_.clear();
  weights_.clear();
  page_table_.clear();
  tokens_ = 0;
  for (int64_t column = 0; column < size(blocks); ++column)
    tabulate_block(column, form.local, page_size);
  longest_ = 0;
  for (const Entry& entry : entries) longest_ = std::max(longest_, entry.rows);

  const auto words = [](const auto& table) {
    return size(table) * kWords<typename std::decay_t<decltype(table)>::value_type>;
  };
  word_count = kWords<Header> + size(entries) + 1 + words(segments_) + words(pairs_) +
               words(weights_) + words(page_table_) + row_count * kWords<Row>;
  for (const auto& omega : form.omegas)
    word_count += kWords<Rope> + size(omega) * (size(pairs_) + longest_ + row_count);
}

void Step::tabulate_block(int64_t column, bool local, int64_t page_size) {
  const Block& block = *layout->blocks[at(blocks[at(column)])];
  const int64_t writer = writers_[at(column)];
  const Write* write = writer < 0 ? nullptr : &writes[at(entries[at(writer)].write)];
  const auto new_pages = write == nullptr
                             ? std::span<const int64_t>()
                             : std::span(pages).subspan(at(write->pages), at(write->count));
  const auto add = [&](const Keys& keys, std::span<const int64_t> old) {
    page_table_.insert(page_table_.end(), old.begin(), old.end());
    const int64_t before = size(segments_);
    if (keys.old == keys.n) {
      add_segment(keys, local);
    } else {
      page_table_.insert(page_table_.end(), new_pages.begin(), new_pages.end());
      if (implicit_self && keys.old > 0) {
        // What was there before is hidden from the writer only: two segments.
        Keys part = keys;
        part.n = keys.old;
        add_segment(part, local);
        part = keys;
        part.n -= keys.old;
        part.old = 0;
        part.page += (keys.first + keys.old) / page_size;
        part.first = (keys.first + keys.old) % page_size;
        part.s0 += keys.old;
        part.r0 += keys.old;
        add_segment(part, local);
      } else {
        add_segment(keys, local);
      }
    }
    if (size(segments_) == before) page_table_.resize(at(keys.page));
  };
  for (const Run& run : block.runs) {
    const bool grows = write != nullptr && write->extend && &run == &block.runs.back();
    auto old = run.pages(page_size);
    if (grows && write->copy) old = old.first(old.size() - 1);
    add({column, run.n + (grows ? write->rows : 0), run.n, size(page_table_), run.first, run.s0,
         run.r0},
        old);
  }
  if (write == nullptr || write->extend) return;
  const auto tail = write->tail >= 0 ? std::span(&write->tail, 1) : std::span<const int64_t>();
  add({column, write->rows, 0, size(page_table_), write->first(), block.extent, block.extent},
      tail);
}

void Step::add_segment(const Keys& keys, bool local) {
  const int64_t count = size(entries), column = keys.column, first_pair = size(pairs_);
  bool seen = false;
  for (int64_t e = 0; e < count; ++e) {
    const Entry& entry = entries[at(e)];
    const Place& place = places_[at(column * count + e)];
    const bool own = writers_[at(column)] == e;
    Pair pair{kHidden, 0, 0, 0};
    const int64_t n = own || !lagged ? keys.n : keys.old;
    if (place.seen && n > 0 && !(own && implicit_self && keys.old == keys.n)) {
      const int64_t query = own_origins_[at(e)] + entry.n0;  // position of the entry's row 0
      const int64_t place0 = place.origin + keys.s0;         // of key 0
      const int64_t rising = entry.n0 + 1 - keys.s0;         // keys that row 0 may see, if own
      const bool all = !own || rising >= n;
      pair = {all ? kVisible : kRising, all ? n : rising, query - place0,
              (local ? own_origins_[at(e)] : query) - place0 + keys.r0};
      seen = true;
    }
    pairs_.push_back(pair);
    weights_.push_back({place.bias, place.gain});
  }
  if (!seen) {
    pairs_.resize(at(first_pair));
    weights_.resize(at(first_pair));
    return;
  }
  segments_.push_back({column, keys.n, keys.page, keys.first, keys.s0, keys.r0, tokens_, 0});
  tokens_ += keys.n;
}

void Step::fill(const Form& form, int64_t page_size, int64_t* out) const {
  Header header{};
  header.magic = kPlanMagic;
  header.words = word_count;
  header.workers = size(entries);
  header.rows = row_count;
  header.segments = size(segments_);
  header.blocks = size(blocks);
  header.page_size = page_size;
  header.pages = size(page_table_);
  header.longest = longest_;
  header.tokens = tokens_;
  header.step = form.local ? 0 : 1;
  header.types = size(form.omegas);

  int64_t offset = kWords<Header>;
  header.row_ptr = offset;
  out[offset++] = 0;
  for (const Entry& entry : entries) out[offset++] = entry.row + entry.rows;
  header.segment = offset;
  header.pair = put(out, header.segment, segments_);
  header.weight = put(out, header.pair, pairs_);
  header.page = put(out, header.weight, weights_);
  header.row = put(out, header.page, page_table_);
  offset = header.row;
  for (int64_t e = 0; e < size(entries); ++e) {
    const Entry& entry = entries[at(e)];
    for (int64_t t = 0; t < entry.rows; ++t) {
      const Row row{e, t, slot(writes[at(entry.write)], t, page_size), entry.n0 + t};
      std::memcpy(out + offset, &row, sizeof row);
      offset += kWords<Row>;
    }
  }
  header.rope = offset;
  offset += header.types * kWords<Rope>;
  for (int64_t type = 0; type < header.types; ++type) {
    const std::vector<double>& omega = form.omegas[at(type)];
    const int64_t pairs = size(omega);
    const Rope rope{pairs, offset};
    std::memcpy(out + header.rope + type * kWords<Rope>, &rope, sizeof rope);
    // A row of F pairs of float32 is F words.
    const auto turn = [&](int64_t position) {
      rotation(omega.data(), pairs, position, reinterpret_cast<float*>(out + offset));
      offset += pairs;
    };
    for (const Pair& pair : pairs_) {
      if (pair.state == kHidden)
        offset += pairs;
      else
        turn(pair.delta0);
    }
    for (int64_t t = 0; t < longest_; ++t) turn(t);
    for (const Entry& entry : entries)
      for (int64_t t = 0; t < entry.rows; ++t) turn(entry.n0 + t);
  }
  std::memcpy(out, &header, sizeof header);
}

}  // namespace alignops::attention::store
