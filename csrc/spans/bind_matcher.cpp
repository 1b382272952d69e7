// alignops._C.SpanMatcher: the incremental matcher, over NumPy arrays. alignops/spans/matcher.py is
// its interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "bind.h"
#include "matcher.h"
#include "store.h"

namespace py = pybind11;

namespace alignops::spans {
namespace {

using Longs = py::array_t<int64_t, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Bools = py::array_t<bool, py::array::c_style>;

template <class T>
std::span<const T> view(const py::array_t<T, py::array::c_style>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

template <class T, class To = T>
py::array_t<To> array_of(const std::vector<T>& values) {
  py::array_t<To> out(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

Source source_of(const std::shared_ptr<Store>& store) {
  Source source;
  for (int32_t s = 0; s < store->num_shards(); ++s) source.shards.push_back(store->shard(s));
  source.owner = store;
  source.check = [store] { store->check_sizes(); };
  source.raise = [store](int32_t shard, const Fault& fault) { store->raise(shard, fault); };
  return source;
}

template <class Choice>
Choice choose(const char* argument, const std::string& value,
              std::initializer_list<const char*> names) {
  std::string choices;
  int32_t i = 0;
  for (const char* name : names) {
    if (value == name) return static_cast<Choice>(i);
    choices += (i++ > 0 ? ", " : "") + std::string(name);
  }
  throw std::invalid_argument(
      message("SpanMatcher: ", argument, " must be one of ", choices, ", got '", value, "'"));
}

// A matcher that notices when two threads use it at once.
class Guarded {
 public:
  explicit Guarded(Matcher matcher) : matcher_(std::move(matcher)) {}

  // body(matcher), with or without the lock of the interpreter.
  template <class Body>
  auto use(const Body& body) {
    const Turn turn(busy_);
    return body(matcher_);
  }
  template <class Body>
  auto use_without_gil(const Body& body) {
    const Turn turn(busy_);
    const py::gil_scoped_release release;
    return body(matcher_);
  }

 private:
  struct Turn {
    explicit Turn(std::atomic_flag& flag) : busy(flag) {
      if (busy.test_and_set(std::memory_order_acquire))
        throw std::runtime_error("SpanMatcher: is used by another thread; copy it for each thread");
    }
    ~Turn() { busy.clear(std::memory_order_release); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    std::atomic_flag& busy;
  };

  Matcher matcher_;
  std::atomic_flag busy_;
};

// Of the tokens that occur; SpanMatcher needs a surprisal for each token of the vocabulary.
std::shared_ptr<const RangeMax> occurring(const Store& store,
                                          const std::vector<double>& surprisal) {
  ALIGNOPS_CHECK(surprisal.size() == store.info().vocab_size, "SpanMatcher: surprisal must have ",
                 store.info().vocab_size, " elements (vocab_size), got ", surprisal.size());
  std::vector<double> values(surprisal.size());
  const auto ids = store.ids();
  const auto counts = store.counts();
  for (size_t i = 0; i < counts.size(); ++i) {
    const size_t token = ids.empty() ? i : ids[i];
    if (counts[i] > 0) values[token] = surprisal[token];
  }
  return std::make_shared<const RangeMax>(values);
}

std::unique_ptr<Guarded> make(const std::shared_ptr<Store>& store,
                              const std::optional<std::shared_ptr<Store>>& allow, int64_t batch,
                              int64_t max_match, const std::string& kind, double tau,
                              int64_t min_len, std::optional<int64_t> max_count, double severity,
                              const std::string& allow_mode, const Doubles& surprisal) {
  MatchRule rule;
  rule.kind = choose<MatchRule::Kind>("kind", kind, {"bci", "norm", "max"});
  rule.allow = choose<MatchRule::Allow>("allow_mode", allow_mode, {"exact", "cover"});
  rule.tau = tau;
  rule.severity = severity;
  rule.min_len = min_len;
  rule.max_count = max_count.value_or(INT64_MAX);
  // An index of one token has no scale; nothing in it can be more surprising than certain.
  rule.log_tokens = std::log(static_cast<double>(std::max<uint64_t>(store->tokens(), 2)));
  const auto owned = std::make_shared<const std::vector<double>>(
      surprisal.data(), surprisal.data() + surprisal.size());
  check_surprisal(*owned, "SpanMatcher");
  rule.surprisal = *owned;
  rule.owner = owned;
  rule.occurring = occurring(*store, *owned);
  return std::make_unique<Guarded>(Matcher(source_of(store),
                                           allow ? std::optional(source_of(*allow)) : std::nullopt,
                                           std::move(rule), batch, max_match));
}

// Arrays (of the shape): length, count, bci, risk, flag.
py::tuple arrays_of(const std::vector<MatchState>& states, const std::vector<py::ssize_t>& shape) {
  Longs length(shape), count(shape);
  Doubles bci(shape), risk(shape);
  Bools flag(shape);
  for (size_t i = 0; i < states.size(); ++i) {
    length.mutable_data()[i] = states[i].length;
    count.mutable_data()[i] = states[i].count;
    bci.mutable_data()[i] = states[i].bci;
    risk.mutable_data()[i] = states[i].risk;
    flag.mutable_data()[i] = states[i].flag;
  }
  return py::make_tuple(length, count, bci, risk, flag);
}

void check_rows(const Longs& candidates, const Matcher& matcher) {
  ALIGNOPS_CHECK(candidates.ndim() == 2 && candidates.shape(0) == matcher.batch(),
                 "SpanMatcher: candidates must have shape (batch, width) with batch ",
                 matcher.batch(), ", got ",
                 shape_string(std::vector<py::ssize_t>(candidates.shape(),
                                                       candidates.shape() + candidates.ndim())));
}

void advance(Guarded& self, const Longs& tokens, const std::optional<Longs>& parent) {
  self.use_without_gil([&](Matcher& m) {
    m.advance(view(tokens), parent ? std::optional(view(*parent)) : std::nullopt);
  });
}

void reset(Guarded& self, const std::optional<Longs>& rows) {
  self.use([&](Matcher& m) {
    if (rows) return m.reset(view(*rows));
    std::vector<int64_t> all(static_cast<size_t>(m.batch()));
    std::iota(all.begin(), all.end(), 0);
    m.reset(all);
  });
}

py::tuple state(Guarded& self) {
  return self.use([](Matcher& m) {
    std::vector<MatchState> states;
    for (int64_t i = 0; i < m.batch(); ++i) states.push_back(m.state(i));
    return arrays_of(states, {m.batch()});
  });
}

Bools peek(Guarded& self, const Longs& candidates) {
  std::vector<uint8_t> flags(static_cast<size_t>(candidates.size()));
  self.use_without_gil([&](Matcher& m) {
    check_rows(candidates, m);
    m.peek(view(candidates), flags);
  });
  Bools out({candidates.shape(0), candidates.shape(1)});
  std::copy(flags.begin(), flags.end(), out.mutable_data());
  return out;
}

py::tuple peek_exact(Guarded& self, const Longs& candidates) {
  std::vector<MatchState> states(static_cast<size_t>(candidates.size()));
  self.use_without_gil([&](Matcher& m) {
    check_rows(candidates, m);
    m.peek_exact(view(candidates), states);
  });
  return arrays_of(states, {candidates.shape(0), candidates.shape(1)});
}

py::tuple flagged(Guarded& self) {
  const auto pairs = self.use_without_gil([](Matcher& m) { return m.flagged(); });
  Longs rows(static_cast<py::ssize_t>(pairs.size())), tokens(rows.size());
  for (size_t i = 0; i < pairs.size(); ++i) {
    rows.mutable_data()[i] = pairs[i].first;
    tokens.mutable_data()[i] = pairs[i].second;
  }
  return py::make_tuple(rows, tokens);
}

Bools active(Guarded& self) {
  return self.use([](Matcher& m) {
    Bools out(m.batch());
    for (int64_t i = 0; i < m.batch(); ++i) out.mutable_data()[i] = m.active(i);
    return out;
  });
}

void set_active(Guarded& self, const Bools& mask) {
  self.use([&](Matcher& m) {
    ALIGNOPS_CHECK(mask.ndim() == 1 && mask.size() == m.batch(), "SpanMatcher: active must have ",
                   m.batch(), " elements, got ", mask.size());
    for (int64_t i = 0; i < m.batch(); ++i) m.set_active(i, mask.data()[i]);
  });
}

// Flat arrays; row i has the tokens [offsets[i], offsets[i + 1]) and one more sum than tokens.
py::dict save(Guarded& self) {
  Matcher::Tail all;
  all.sums.clear();
  std::vector<int64_t> offsets{0};
  std::vector<uint8_t> active, prompt;
  self.use([&](Matcher& m) {
    for (int64_t i = 0; i < m.batch(); ++i) {
      const Matcher::Tail tail = m.save(i);
      all.tokens.insert(all.tokens.end(), tail.tokens.begin(), tail.tokens.end());
      all.covered.insert(all.covered.end(), tail.covered.begin(), tail.covered.end());
      all.sums.insert(all.sums.end(), tail.sums.begin(), tail.sums.end());
      offsets.push_back(static_cast<int64_t>(all.tokens.size()));
      active.push_back(tail.active);
      prompt.push_back(tail.prompt);
    }
  });
  py::dict out;
  out["tokens"] = array_of(all.tokens);
  out["offsets"] = array_of(offsets);
  out["covered"] = array_of<uint8_t, bool>(all.covered);
  out["sums"] = array_of(all.sums);
  out["active"] = array_of<uint8_t, bool>(active);
  out["prompt"] = array_of<uint8_t, bool>(prompt);
  return out;
}

void restore(Guarded& self, const Longs& tokens, const Longs& offsets, const Bools& covered,
             const Doubles& sums, const Bools& active, const Bools& prompt) {
  const int64_t rows = active.size(), total = tokens.size();
  ALIGNOPS_CHECK(offsets.size() == rows + 1 && prompt.size() == rows && covered.size() == total &&
                     sums.size() == total + rows,
                 "SpanMatcher: state must hold arrays of rows and tokens that fit, got ", rows,
                 " rows, ", offsets.size(), " offsets, ", total, " tokens, ", covered.size(),
                 " covered, ", sums.size(), " sums");
  std::vector<Matcher::Tail> tails;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = offsets.data()[i], end = offsets.data()[i + 1];
    ALIGNOPS_CHECK(begin >= 0 && begin <= end && end <= total && (i > 0 || begin == 0) &&
                       (i + 1 < rows || end == total),
                   "SpanMatcher: state must have offsets from 0 to ", total, ", got ", begin,
                   " and ", end, " for row ", i);
    tails.push_back({{tokens.data() + begin, tokens.data() + end},
                     {covered.data() + begin, covered.data() + end},
                     {sums.data() + begin + i, sums.data() + end + i + 1},
                     active.data()[i],
                     prompt.data()[i]});
  }
  self.use_without_gil([&](Matcher& m) { m.restore(tails); });
}

}  // namespace

void bind_spans_matcher(py::module_& m) {
  py::class_<Guarded>(
      m, "SpanMatcher",
      "Longest suffixes of growing rows. Not for use by several threads at once, which is noticed.")
      .def(py::init(&make), py::arg("store"), py::arg("allow"), py::arg("batch"),
           py::arg("max_match"), py::arg("kind"), py::arg("tau"), py::arg("min_len"),
           py::arg("max_count"), py::arg("severity"), py::arg("allow_mode"), py::arg("surprisal"))
      .def_property_readonly(
          "batch", [](Guarded& self) { return self.use([](Matcher& x) { return x.batch(); }); })
      .def_property("active", &active, &set_active)
      .def("advance", &advance, py::arg("tokens"), py::arg("parent"))
      .def(
          "extend",
          [](Guarded& self, const Longs& tokens, const Longs& offsets) {
            self.use_without_gil([&](Matcher& x) { x.extend(view(tokens), view(offsets)); });
          },
          py::arg("tokens"), py::arg("offsets"))
      .def("reset", &reset, py::arg("rows"))
      .def("state", &state, "Arrays (batch,): length, count, bci, risk, flag.")
      .def("peek", &peek, py::arg("candidates"))
      .def("peek_exact", &peek_exact, py::arg("candidates"),
           "Arrays (batch, width): length, count, bci, risk, flag.")
      .def("flagged", &flagged, "Arrays of rows and tokens.")
      .def("save", &save)
      .def("restore", &restore, py::arg("tokens"), py::arg("offsets"), py::arg("covered"),
           py::arg("sums"), py::arg("active"), py::arg("prompt"))
      .def("copy", [](Guarded& self) {
        return self.use([](const Matcher& x) { return std::make_unique<Guarded>(x); });
      });
}

}  // namespace alignops::spans
