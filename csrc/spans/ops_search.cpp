// Searches in an index given as tensors, on the CPU. What the tensors hold is checked where the
// kernels rely on it: ids, bounds of rows, and the entries of `first` that are used; entries of
// `suf` are checked by the kernels.
#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "matcher.h"
#include "ops_index.h"

namespace alignops::spans {
namespace {

// Searches that take about 10 us.
constexpr int64_t kGrain = 16;

[[noreturn]] void raise(const char* op, const Shard& shard, const Fault& fault) {
  throw std::invalid_argument(message(op, ": suf must hold sorted positions below ",
                                      shard.text_size,
                                      " (the size of text), got a bad one at rank ", fault.index));
}

// Runs body(begin, end), which returns a Fault, for all of [0, count).
template <class Body>
void parallel(const char* op, const Shard& shard, int64_t count, int64_t grain, const Body& body) {
  std::mutex mutex;
  Fault fault;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) noexcept {
    const Fault found = body(begin, end);
    if (found.status == Status::kOk) return;
    const std::lock_guard<std::mutex> lock(mutex);
    fault = found;
  });
  if (fault.status != Status::kOk) raise(op, shard, fault);
}

// Checks ids and the buckets of the index that they lead to.
class Ids {
 public:
  Ids(const char* op, const Shard& shard) : op_(op), shard_(shard) {}

  void check(int64_t token, const char* argument, int64_t i) const {
    if (token < 0 || static_cast<uint64_t>(token) >= shard_.vocab) {
      const bool sep = token == static_cast<int64_t>(separator(shard_.token_bytes));
      throw std::out_of_range(
          message(op_, ": ", argument, " must lie in [0, ", shard_.vocab, "), got ", token, " at ",
                  i, sep ? ", the separator: no match crosses the end of a document" : ""));
    }
    const uint64_t lo = shard_.first[token], hi = shard_.first[token + 1];
    ALIGNOPS_CHECK(lo <= hi && hi <= shard_.suf_size, op_, ": first must rise from 0 to ",
                   shard_.suf_size, " (the length of suf), got ", static_cast<int64_t>(lo), " and ",
                   static_cast<int64_t>(hi), " for token ", token);
  }

  // In the width of the text, with padding.
  std::vector<uint8_t> encode(const int64_t* tokens, int64_t count, const char* argument) const {
    const auto width = static_cast<size_t>(shard_.token_bytes);
    std::vector<uint8_t> out(static_cast<size_t>(count) * width + kQueryPadding);
    for (int64_t i = 0; i < count; ++i) {
      check(tokens[i], argument, i);
      const auto value = static_cast<uint32_t>(tokens[i]);
      std::memcpy(out.data() + static_cast<size_t>(i) * width, &value, width);
    }
    return out;
  }

 private:
  const char* op_;
  const Shard& shard_;
};

// Ragged of an op, with their ids checked.
struct Ragged {
  Ragged(const char* op, const Shard& shard, const Tensor& tokens, const Tensor& offsets)
      : count(check_ragged(tokens, offsets, op, kCpu)),
        ids(tokens.const_data_ptr<int64_t>()),
        begin(offsets.const_data_ptr<int64_t>()) {
    const int64_t total = tokens.size(0);
    ALIGNOPS_CHECK(begin[0] == 0 && begin[count] == total, op, ": offsets must go from 0 to ",
                   total, " (the number of tokens), got ", begin[0], " to ", begin[count]);
    for (int64_t i = 0; i < count; ++i)
      ALIGNOPS_CHECK(begin[i] <= begin[i + 1], op, ": offsets must not decrease, got ", begin[i],
                     " before ", begin[i + 1]);
    encoded = Ids(op, shard).encode(ids, total, "tokens");
  }

  Queries queries() const { return {encoded.data(), begin, begin + 1}; }

  int64_t count;
  const int64_t* ids;
  const int64_t* begin;
  std::vector<uint8_t> encoded;
};

Tensor find(const Tensor& text, const Tensor& suf, const Tensor& first, const Tensor& tokens,
            const Tensor& offsets) {
  const char* op = "spans_find";
  const Shard shard = index_view(text, suf, first, op, kCpu);
  const Ragged rows(op, shard, tokens, offsets);
  Tensor out = torch::stable::new_empty(tokens, {rows.count, 2});
  int64_t* intervals = out.mutable_data_ptr<int64_t>();
  const Scratch<int64_t> lo(rows.count), hi(rows.count);
  const Kernels& table = kernels();
  parallel(op, shard, rows.count, kGrain, [&](int64_t begin, int64_t end) {
    const Fault fault = table.find(shard, {rows.queries(), lo.data(), hi.data()}, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      intervals[2 * i] = lo.data()[i];
      intervals[2 * i + 1] = hi.data()[i];
    }
    return fault;
  });
  return out;
}

Tensor next_counts(const Tensor& text, const Tensor& suf, const Tensor& first, const Tensor& tokens,
                   const Tensor& offsets, const Tensor& cand) {
  const char* op = "spans_next_counts";
  const Shard shard = index_view(text, suf, first, op, kCpu);
  const Ragged rows(op, shard, tokens, offsets);
  const int64_t width = check_candidates(cand, rows.count, op, kCpu);
  const int64_t* ids = cand.const_data_ptr<int64_t>();
  const std::vector<uint8_t> encoded = Ids(op, shard).encode(ids, rows.count * width, "cand");

  Tensor out = torch::stable::new_empty(cand, {rows.count, width});
  int64_t* counts = out.mutable_data_ptr<int64_t>();
  const int64_t items = rows.count * width;
  const Scratch<int64_t> row_lo(rows.count), row_hi(rows.count);
  const Scratch<int64_t> lo(items), hi(items), depth(items);
  const Kernels& table = kernels();
  parallel(op, shard, rows.count, kGrain, [&](int64_t begin, int64_t end) {
    return table.find(shard, {rows.queries(), row_lo.data(), row_hi.data()}, begin, end);
  });
  for (int64_t i = 0; i < items; ++i) {
    const int64_t row = i / width;
    lo.data()[i] = row_lo.data()[row];
    hi.data()[i] = row_hi.data()[row];
    depth.data()[i] = rows.begin[row + 1] - rows.begin[row];
  }
  const NarrowArgs args{encoded.data(), lo.data(), hi.data(), depth.data(), lo.data(), hi.data()};
  parallel(op, shard, items, kGrain, [&](int64_t begin, int64_t end) {
    const Fault fault = table.narrow(shard, args, begin, end);
    for (int64_t i = begin; i < end; ++i) counts[i] = hi.data()[i] - lo.data()[i];
    return fault;
  });
  return out;
}

// A matcher that only lives for one call: its rows are those of [begin, end).
void peek_rows(const Source& source, const MatchRule& rule, const Ragged& rows, const int64_t* ids,
               int64_t width, int64_t begin, int64_t end, MatchState* states) {
  int64_t longest = 0;
  std::vector<int64_t> offsets;
  for (int64_t row = begin; row <= end; ++row)
    offsets.push_back(rows.begin[row] - rows.begin[begin]);
  for (int64_t row = begin; row < end; ++row)
    longest = std::max(longest, rows.begin[row + 1] - rows.begin[row]);
  Matcher matcher(source, std::nullopt, rule, end - begin, longest + 1);
  matcher.extend({rows.ids + rows.begin[begin], static_cast<size_t>(offsets.back())}, offsets);
  const auto count = static_cast<size_t>((end - begin) * width);
  matcher.peek_exact({ids + begin * width, count}, {states + begin * width, count});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> peek(const Tensor& text, const Tensor& suf,
                                                const Tensor& first, const Tensor& tokens,
                                                const Tensor& offsets, const Tensor& cand,
                                                const Tensor& surprisal, double tau,
                                                int64_t min_len, int64_t max_count) {
  const char* op = "spans_peek";
  const Shard shard = index_view(text, suf, first, op, kCpu);
  const Ragged rows(op, shard, tokens, offsets);
  const int64_t width = check_candidates(cand, rows.count, op, kCpu), items = rows.count * width;
  const auto vocab = static_cast<int64_t>(shard.vocab);
  check_layout(surprisal, ScalarType::Double, {vocab}, op, "surprisal");
  check_rule(tau, min_len, max_count, op);
  MatchRule rule;
  rule.tau = tau;
  rule.min_len = min_len;
  rule.max_count = max_count;
  rule.surprisal = {surprisal.const_data_ptr<double>(), static_cast<size_t>(vocab)};
  check_surprisal(rule.surprisal, op);
  const int64_t* ids = cand.const_data_ptr<int64_t>();
  const Ids checks(op, shard);
  for (int64_t i = 0; i < items; ++i) checks.check(ids[i], "cand", i);

  const auto shape = cand.sizes();
  Tensor flag = torch::stable::new_empty(cand, shape, ScalarType::Bool);
  Tensor length = torch::stable::new_empty(cand, shape);
  Tensor count = torch::stable::new_empty(cand, shape);
  Tensor bci = torch::stable::new_empty(cand, shape, ScalarType::Double);
  Source source;
  source.shards = {shard};
  source.raise = [&](int32_t, const Fault& fault) { raise(op, shard, fault); };
  std::vector<MatchState> states(static_cast<size_t>(items));
  std::mutex mutex;
  std::exception_ptr failure;
  torch::stable::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) noexcept {
    try {
      peek_rows(source, rule, rows, ids, width, begin, end, states.data());
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  for (int64_t i = 0; i < items; ++i) {
    const MatchState& state = states[static_cast<size_t>(i)];
    flag.mutable_data_ptr<bool>()[i] = state.flag;
    length.mutable_data_ptr<int64_t>()[i] = state.length;
    count.mutable_data_ptr<int64_t>()[i] = state.count;
    bci.mutable_data_ptr<double>()[i] = state.bci;
  }
  return {flag, length, count, bci};
}

}  // namespace
}  // namespace alignops::spans

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def(
      "spans_find(Tensor text, Tensor suf, Tensor first, Tensor tokens, Tensor offsets) -> Tensor");
  m.def(
      "spans_next_counts(Tensor text, Tensor suf, Tensor first, Tensor tokens, Tensor offsets, "
      "Tensor cand) -> Tensor");
  m.def(
      "spans_peek(Tensor text, Tensor suf, Tensor first, Tensor tokens, Tensor offsets, Tensor "
      "cand, Tensor surprisal, float tau, int min_len, int max_count) -> (Tensor flag, Tensor "
      "length, Tensor count, Tensor bci)");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("spans_find", TORCH_BOX(&alignops::spans::find));
  m.impl("spans_next_counts", TORCH_BOX(&alignops::spans::next_counts));
  m.impl("spans_peek", TORCH_BOX(&alignops::spans::peek));
}
