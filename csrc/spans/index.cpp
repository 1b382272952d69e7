#include "index.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "../common/check.h"
#include "removed.h"

namespace alignops::spans {
namespace {

size_t index(int64_t i) { return static_cast<size_t>(i); }

template <class Token, class From>
void narrow_ids(std::span<const From> ids, uint64_t vocab, const char* op, const char* argument,
                uint8_t* out) {
  auto* tokens = reinterpret_cast<Token*>(out);
  bool bad = false;
  for (size_t i = 0; i < ids.size(); ++i) {
    // A negative id becomes a number beyond any vocabulary.
    bad |= static_cast<uint64_t>(static_cast<int64_t>(ids[i])) >= vocab;
    tokens[i] = static_cast<Token>(ids[i]);
  }
  if (!bad) return;
  size_t i = 0;
  while (static_cast<uint64_t>(static_cast<int64_t>(ids[i])) < vocab) ++i;
  const auto id = static_cast<int64_t>(ids[i]);
  std::string text =
      message(op, ": ", argument, " must hold ids in [0, ", vocab, "), got ", id, " at ", i);
  if (id == static_cast<int64_t>(separator(sizeof(Token))))
    text += ", the separator of documents: matches cannot cross documents";
  throw std::out_of_range(text);
}

std::vector<uint8_t> narrow_ids(const Ids& ids, const IndexInfo& info, const char* op,
                                const char* argument) {
  return std::visit(
      [&](const auto& view) {
        std::vector<uint8_t> out(view.size() * index(info.token_bytes) + index(kQueryPadding));
        if (info.token_bytes == 1) {
          narrow_ids<uint8_t>(view, info.vocab_size, op, argument, out.data());
        } else if (info.token_bytes == 2) {
          narrow_ids<uint16_t>(view, info.vocab_size, op, argument, out.data());
        } else {
          narrow_ids<uint32_t>(view, info.vocab_size, op, argument, out.data());
        }
        return out;
      },
      ids);
}

int64_t size_of(const Ids& ids) {
  return std::visit([](const auto& view) { return static_cast<int64_t>(view.size()); }, ids);
}

uint32_t read_token(const uint8_t* tokens, int32_t token_bytes, int64_t i) {
  if (token_bytes == 1) return tokens[i];
  if (token_bytes == 2) return reinterpret_cast<const uint16_t*>(tokens)[i];
  return reinterpret_cast<const uint32_t*>(tokens)[i];
}

}  // namespace

Index::Index(std::shared_ptr<const Store> store, ParallelFor parallel)
    : store_(std::move(store)), parallel_(std::move(parallel)) {}

Batch Index::encode(const char* op, const char* argument, const Ids& ids) const {
  return {narrow_ids(ids, store_->info(), op, argument), {0, size_of(ids)}};
}

Batch Index::encode(const char* op, const char* argument, const Ids& ids,
                    std::span<const int64_t> offsets) const {
  const int64_t size = size_of(ids);
  ALIGNOPS_CHECK(!offsets.empty() && offsets.front() == 0 && offsets.back() == size, op,
                 ": offsets must begin with 0 and end with ", size, ", the number of ", argument,
                 ", got ",
                 offsets.empty() ? "none" : message(offsets.front(), " and ", offsets.back()));
  for (size_t i = 1; i < offsets.size(); ++i)
    ALIGNOPS_CHECK(offsets[i - 1] <= offsets[i], op, ": offsets must not decrease, got ",
                   offsets[i - 1], " and then ", offsets[i], " at ", i);
  return {narrow_ids(ids, store_->info(), op, argument), {offsets.begin(), offsets.end()}};
}

const Kernels& Index::begin_batch() const {
  store_->check_sizes();
  return kernels();
}

uint32_t Index::token(const Batch& batch, int64_t i) const {
  return read_token(batch.tokens.data(), store_->info().token_bytes, i);
}

Index::Intervals Index::find_rows(const Kernels& kernels, int32_t s, const uint8_t* tokens,
                                  const int64_t* begin, const int64_t* end, int64_t rows) const {
  Intervals out{std::vector<int64_t>(index(rows)), std::vector<int64_t>(index(rows))};
  const FindArgs args{{tokens, begin, end}, out.lo.data(), out.hi.data()};
  search(s, rows,
         [&](const Shard& shard, int64_t b, int64_t e) { return kernels.find(shard, args, b, e); });
  return out;
}

std::vector<int64_t> Index::count_rows(const Kernels& kernels, const Batch& batch,
                                       const std::vector<int64_t>& begin,
                                       const std::vector<int64_t>& end) const {
  std::vector<int64_t> counts(begin.size());
  for (int32_t s = 0; s < store_->num_shards(); ++s) {
    const Intervals found = find_rows(kernels, s, batch.tokens.data(), begin.data(), end.data(),
                                      static_cast<int64_t>(begin.size()));
    for (size_t i = 0; i < counts.size(); ++i)
      counts[i] += live(store_->shard(s), found.lo[i], found.hi[i]);
  }
  return counts;
}

void Index::find(const Batch& batch, int64_t* intervals) const {
  const Kernels& kernels = begin_batch();
  const int64_t shards = num_shards();
  for (int32_t s = 0; s < shards; ++s) {
    const Intervals found = find_rows(kernels, s, batch.tokens.data(), batch.offsets.data(),
                                      batch.offsets.data() + 1, batch.rows());
    for (int64_t i = 0; i < batch.rows(); ++i) {
      intervals[2 * (i * shards + s)] = live_rank(store_->shard(s), found.lo[index(i)]);
      intervals[2 * (i * shards + s) + 1] = live_rank(store_->shard(s), found.hi[index(i)]);
    }
  }
}

void Index::count(const Batch& batch, int64_t* counts) const {
  const Kernels& kernels = begin_batch();
  std::fill_n(counts, batch.rows(), 0);
  for (int32_t s = 0; s < store_->num_shards(); ++s) {
    const Intervals found = find_rows(kernels, s, batch.tokens.data(), batch.offsets.data(),
                                      batch.offsets.data() + 1, batch.rows());
    for (int64_t i = 0; i < batch.rows(); ++i)
      counts[i] += live(store_->shard(s), found.lo[index(i)], found.hi[index(i)]);
  }
}

// By shard: the ranks of these occurrences.
std::vector<Index::Picked> Index::pick(const Batch& batch, std::span<const int64_t> rows,
                                       std::span<const int64_t> numbers) const {
  const int64_t shards = num_shards();
  std::vector<int64_t> intervals(index(batch.rows() * shards * 2));
  find(batch, intervals.data());
  std::vector<Picked> picked(index(shards));
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (rows[i] < 0 || rows[i] >= batch.rows())
      throw std::out_of_range(
          message("locate: rows must lie in [0, ", batch.rows(), "), got ", rows[i]));
    const int64_t* interval = &intervals[index(2 * rows[i] * shards)];
    int64_t rest = numbers[i], s = 0;
    while (s < shards && rest >= interval[2 * s + 1] - interval[2 * s]) {
      rest -= interval[2 * s + 1] - interval[2 * s];
      ++s;
    }
    if (numbers[i] < 0 || s == shards)
      throw std::out_of_range(message("locate: row ", rows[i], " has no occurrence ", numbers[i]));
    picked[index(s)].rank.push_back(
        rank_of_live(store_->shard(static_cast<int32_t>(s)), interval[2 * s] + rest));
    picked[index(s)].place.push_back(static_cast<int64_t>(i));
  }
  return picked;
}

Hits Index::occurrences(const Batch& batch, std::span<const int64_t> rows,
                        std::span<const int64_t> numbers) const {
  const Kernels& kernels = begin_batch();
  const std::vector<Picked> picked = pick(batch, rows, numbers);
  Hits hits;
  hits.row.assign(rows.begin(), rows.end());
  for (auto* values : {&hits.shard, &hits.position, &hits.document, &hits.offset})
    values->resize(rows.size());
  for (int32_t s = 0; s < store_->num_shards(); ++s) {
    const Picked& here = picked[index(s)];
    const Hits part = hits_at(kernels, s, here.rank);
    for (size_t i = 0; i < here.place.size(); ++i) {
      const size_t at = index(here.place[i]);
      hits.shard[at] = s;
      hits.position[at] = part.position[i];
      hits.document[at] = part.document[i];
      hits.offset[at] = part.offset[i];
    }
  }
  return hits;
}

Hits Index::hits(int64_t s, std::span<const int64_t> ranks) const {
  if (s < 0 || s >= num_shards())
    throw std::out_of_range(message("hits: shard must lie in [0, ", num_shards(), "), got ", s));
  const Kernels& kernels = begin_batch();
  const auto shard = static_cast<int32_t>(s);
  const Shard& view = store_->shard(shard);
  std::vector<int64_t> places;
  places.reserve(ranks.size());
  for (const int64_t rank : ranks) {
    if (rank < 0 || rank >= live_size(view))
      throw std::out_of_range(message("hits: ranks of shard ", s, " must lie in [0, ",
                                      live_size(view), "), got ", rank));
    places.push_back(rank_of_live(view, rank));
  }
  return hits_at(kernels, shard, places);
}

// Of ranks, not live ones, that exist; without rows.
Hits Index::hits_at(const Kernels& kernels, int32_t s, std::span<const int64_t> ranks) const {
  Hits hits;
  hits.shard.assign(ranks.size(), s);
  for (auto* values : {&hits.position, &hits.document, &hits.offset}) values->resize(ranks.size());
  search(s, std::ssize(ranks), [&](const Shard& shard, int64_t b, int64_t e) {
    return kernels.positions(shard, {ranks.data(), hits.position.data()}, b, e);
  });
  for (size_t i = 0; i < ranks.size(); ++i) {
    const Place owner = store_->place(s, static_cast<uint64_t>(hits.position[i]));
    hits.document[i] = static_cast<int64_t>(owner.document);
    hits.offset[i] = static_cast<int64_t>(owner.offset);
  }
  return hits;
}

// Longest prefixes of the queries [begin[i], end[i]) over all shards, with the counts of these.
void Index::longest(const Batch& batch, const std::vector<int64_t>& begin,
                    const std::vector<int64_t>& end, int64_t* lengths, int64_t* counts) const {
  const Kernels& kernels = begin_batch();
  const auto items = static_cast<int64_t>(begin.size());
  std::fill_n(lengths, items, 0);
  if (counts != nullptr) std::fill_n(counts, items, 0);
  std::vector<int64_t> length(begin.size());
  for (int32_t s = 0; s < store_->num_shards(); ++s) {
    const bool removed = store_->shard(s).removed_size > 0;
    Intervals found;
    if (counts != nullptr || removed) {
      found.lo.resize(begin.size());
      found.hi.resize(begin.size());
    }
    const MatchArgs args{{batch.tokens.data(), begin.data(), end.data()},
                         length.data(),
                         found.lo.empty() ? nullptr : found.lo.data(),
                         found.hi.empty() ? nullptr : found.hi.data()};
    search(s, items, [&](const Shard& shard, int64_t b, int64_t e) {
      return kernels.match(shard, args, b, e);
    });
    if (removed) shorten(kernels, s, batch, begin, length, found);
    for (int64_t i = 0; i < items; ++i) {
      const size_t k = index(i);
      if (counts != nullptr && length[k] >= lengths[i])
        counts[i] = live(store_->shard(s), found.lo[k], found.hi[k]) +
                    (length[k] == lengths[i] ? counts[i] : 0);
      lengths[i] = std::max(lengths[i], length[k]);
    }
  }
}

// Longest matches of which only removed documents have an occurrence become the longest ones that
// others have. A prefix occurs there if a longer one does, so a search over lengths finds it.
void Index::shorten(const Kernels& kernels, int32_t s, const Batch& batch,
                    const std::vector<int64_t>& begin, std::vector<int64_t>& length,
                    Intervals& found) const {
  const Shard& shard = store_->shard(s);
  struct Item {
    size_t place;
    int64_t absent;  // longer ones than length[place], from which on nothing remains
  };
  std::vector<Item> items;
  for (size_t k = 0; k < length.size(); ++k) {
    if (length[k] == 0 || live(shard, found.lo[k], found.hi[k]) > 0) continue;
    items.push_back({k, length[k]});
    length[k] = 0;
    found.lo[k] = 0;
    found.hi[k] = static_cast<int64_t>(shard.suf_size);
  }
  while (true) {
    std::erase_if(items, [&](const Item& item) { return item.absent == length[item.place] + 1; });
    if (items.empty()) return;
    std::vector<int64_t> from, to;
    for (const Item& item : items) {
      from.push_back(begin[item.place]);
      to.push_back(begin[item.place] + (length[item.place] + item.absent) / 2);
    }
    const Intervals tried = find_rows(kernels, s, batch.tokens.data(), from.data(), to.data(),
                                      static_cast<int64_t>(items.size()));
    for (size_t i = 0; i < items.size(); ++i) {
      const size_t k = items[i].place;
      if (live(shard, tried.lo[i], tried.hi[i]) > 0) {
        length[k] = to[i] - from[i];
        found.lo[k] = tried.lo[i];
        found.hi[k] = tried.hi[i];
      } else {
        items[i].absent = to[i] - from[i];
      }
    }
  }
}

void Index::match(const Batch& batch, int64_t max_match, int64_t* lengths, int64_t* counts) const {
  std::vector<int64_t> begin(index(batch.size())), end(index(batch.size()));
  for (int64_t row = 0; row < batch.rows(); ++row) {
    const int64_t stop = batch.offsets[index(row + 1)];
    for (int64_t i = batch.offsets[index(row)]; i < stop; ++i) {
      begin[index(i)] = i;
      end[index(i)] = std::min(stop, i + max_match);
    }
  }
  longest(batch, begin, end, lengths, counts);
}

void Index::longest_prefix(const Batch& batch, int64_t max_match, int64_t* lengths) const {
  std::vector<int64_t> begin(batch.offsets.begin(), batch.offsets.end() - 1);
  std::vector<int64_t> end(batch.offsets.begin() + 1, batch.offsets.end());
  for (size_t i = 0; i < end.size(); ++i) end[i] = std::min(end[i], begin[i] + max_match);
  longest(batch, begin, end, lengths, nullptr);
}

// A suffix occurs if a longer one does. Each round tries kWays / 2 starts in the bracket of each
// row: they cost little more than one.
void Index::longest_suffix(const Batch& batch, int64_t max_match, int64_t* lengths) const {
  const Kernels& kernels = begin_batch();
  const int64_t rows = batch.rows();
  std::vector<int64_t> absent(index(rows)), present(index(rows));  // starts below, from
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t stop = batch.offsets[index(row + 1)];
    present[index(row)] = stop;
    absent[index(row)] = std::max(batch.offsets[index(row)], stop - max_match) - 1;
  }
  while (true) {
    std::vector<int64_t> begin, end, of;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t gap = present[index(row)] - absent[index(row)] - 1;
      const int64_t tries = std::min(gap, kWays / 2);
      for (int64_t i = 0; i < tries; ++i) {
        begin.push_back(absent[index(row)] + 1 + spread(i, tries, gap));
        end.push_back(batch.offsets[index(row + 1)]);
        of.push_back(row);
      }
    }
    if (begin.empty()) break;
    const std::vector<int64_t> counts = count_rows(kernels, batch, begin, end);
    for (size_t i = 0; i < begin.size(); ++i) {
      if (counts[i] > 0) {
        present[index(of[i])] = std::min(present[index(of[i])], begin[i]);
      } else {
        absent[index(of[i])] = std::max(absent[index(of[i])], begin[i]);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    lengths[row] = batch.offsets[index(row + 1)] - present[index(row)];
}

SpanList Index::maximal_spans(const char* op, const Batch& batch, int64_t max_match,
                              const SpanFilter& filter) const {
  ALIGNOPS_CHECK(filter.min_len >= 1, op, ": min_len must be at least 1, got ", filter.min_len);
  ALIGNOPS_CHECK(!filter.max_count || *filter.max_count >= 0, op,
                 ": max_count must not be negative, got ", filter.max_count.value_or(0));
  const bool masked = filter.word_start.data() != nullptr;
  ALIGNOPS_CHECK(!masked || static_cast<int64_t>(filter.word_start.size()) == batch.size(), op,
                 ": word_start must have one entry per token, ", batch.size(), ", got ",
                 filter.word_start.size());
  const int32_t width = store_->info().token_bytes;
  std::vector<uint32_t> delimiters;
  if (filter.delimiters) {
    const std::vector<uint8_t> ids =
        narrow_ids(*filter.delimiters, store_->info(), op, "delimiters");
    for (int64_t i = 0; i < size_of(*filter.delimiters); ++i)
      delimiters.push_back(read_token(ids.data(), width, i));
    std::sort(delimiters.begin(), delimiters.end());
  }

  std::vector<int64_t> lengths(index(batch.size()));
  match(batch, max_match, lengths.data(), nullptr);
  // A span that is too frequent hides none behind it: where counts decide, all candidates are
  // counted before the choice, else only the chosen ones.
  std::vector<int64_t> row_of, begin, end;
  for (int64_t row = 0; row < batch.rows(); ++row) {
    const int64_t stop = batch.offsets[index(row + 1)];
    int64_t delimiter = stop, kept_end = 0;  // first delimiter at or after `scanned`
    int64_t scanned = batch.offsets[index(row)];
    for (int64_t i = scanned; i < stop; ++i) {
      if (!delimiters.empty() && scanned <= i) {
        for (delimiter = i; delimiter < stop; ++delimiter)
          if (std::binary_search(delimiters.begin(), delimiters.end(), token(batch, delimiter)))
            break;
        scanned = delimiter + 1;
      }
      if (masked && filter.word_start[index(i)] == 0) continue;
      int64_t last = std::min(i + lengths[index(i)], delimiter + 1);
      if (masked)
        while (last > i && last < stop && filter.word_start[index(last)] == 0) --last;
      if (last - i < filter.min_len) continue;
      if (!filter.max_count && last <= kept_end) continue;
      kept_end = last;
      row_of.push_back(row);
      begin.push_back(i);
      end.push_back(last);
    }
  }
  const std::vector<int64_t> counts = count_rows(kernels(), batch, begin, end);
  SpanList out;
  int64_t kept_end = 0;
  for (size_t i = 0; i < begin.size(); ++i) {
    if (filter.max_count && counts[i] > *filter.max_count) continue;
    if (end[i] <= kept_end) continue;
    kept_end = end[i];
    const int64_t origin = batch.offsets[index(row_of[i])];
    out.row.push_back(row_of[i]);
    out.start.push_back(begin[i] - origin);
    out.end.push_back(end[i] - origin);
    out.count.push_back(counts[i]);
  }
  return out;
}

}  // namespace alignops::spans
