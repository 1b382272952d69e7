// The suffix array builders against sorting all suffixes naively: random texts of every width,
// documents with repeats, memory limits, thread counts, cancelling.
#include "spans/suffix.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "harness.h"

namespace alignops::spans {
namespace {

using test::expect;
using test::Guarded;
using test::Random;

using Ids = std::vector<uint32_t>;
constexpr uint32_t kSep = ~uint32_t{0};

// Ids with kSep, as tokens of the width.
template <class Token>
Guarded<Token> narrow(const Ids& ids) {
  Guarded<Token> text(static_cast<int64_t>(ids.size()));
  for (size_t i = 0; i < ids.size(); ++i)
    text[static_cast<int64_t>(i)] = static_cast<Token>(ids[i]);  // kSep becomes the width's SEP
  return text;
}

Ids naive(const Ids& text) {
  Ids order;
  for (uint32_t i = 0; i < text.size(); ++i)
    if (text[i] != kSep) order.push_back(i);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return std::lexicographical_compare(text.begin() + a, text.end(), text.begin() + b, text.end());
  });
  return order;
}

// The stream with the least memory that it accepts and some more, collected.
uint64_t stream(SuffixJob job, uint64_t more) {
  uint32_t* out = std::exchange(job.out, nullptr);
  const uint64_t limit = job.text_size;
  job.mem_bytes = radix_stream_bytes(job.text_size, job.token_bytes, job.vocab) + more;
  uint64_t collected = 0;
  const uint64_t size = build_radix_stream(job, [&](const uint32_t* positions, uint64_t count) {
    expect(collected + count <= limit, "stream: more than the text");
    out = std::copy_n(positions, count, out);
    collected += count;
  });
  expect(collected == size, "stream: size");
  return size;
}

uint64_t least_memory(const SuffixJob& job) { return stream(job, 0); }
uint64_t more_memory(const SuffixJob& job) { return stream(job, 3 * job.text_size); }

struct Build {
  const char* name;
  uint64_t (*run)(const SuffixJob& job);
};
const std::vector<Build>& builds() {
  static const std::vector<Build> all = {
      {"sais", build_sais},
      {"radix", build_radix},
      {"stream, least memory", least_memory},
      {"stream, more memory", more_memory},
  };
  return all;
}

template <class Token>
void check(const Ids& ids, uint32_t vocab, const Ids& expected, int threads,
           const std::string& what) {
  const Guarded<Token> text = narrow<Token>(ids);
  const ParallelFor parallel = threads == 1 ? serial_for() : threads_for(threads);
  for (const Build& build : builds()) {
    if ((build.run == least_memory && ids.size() % 4 != 0) ||
        (build.run == more_memory && ids.size() % 4 != 1))
      continue;  // the streams take their time
    Guarded<uint32_t> out(static_cast<int64_t>(ids.size()));
    Progress progress;
    const SuffixJob job{text.data(), sizeof(Token), ids.size(), vocab,
                        out.data(),  parallel,      progress,   0};
    const uint64_t size = build.run(job);
    const std::string where = what + ", " + build.name + ", width " +
                              std::to_string(8 * sizeof(Token)) + ", threads " +
                              std::to_string(threads);
    expect(size == expected.size(), where + ": size");
    expect(out.intact(), where + ": written outside");
    expect(size == expected.size() && std::equal(expected.begin(), expected.end(), out.data()),
           where + ": order");
  }
}

void check_widths(const Ids& text, uint32_t vocab, int threads, const std::string& what) {
  const Ids expected = naive(text);
  if (vocab <= 0xFF) check<uint8_t>(text, vocab, expected, threads, what);
  if (vocab <= 0xFFFF) check<uint16_t>(text, vocab, expected, threads, what);
  check<uint32_t>(text, vocab, expected, threads, what);
}

// Documents of random ids; some copy pieces of the text so far, some are empty.
Ids random_text(Random& random, int64_t size, uint32_t vocab, int64_t mean_document) {
  Ids text;
  while (static_cast<int64_t>(text.size()) < size) {
    if (random.below(3) == 0 && !text.empty()) {
      const int64_t have = static_cast<int64_t>(text.size()), from = random.below(have);
      const int64_t count = random.below(have - from) + 1;
      for (int64_t i = 0; i < count; ++i) text.push_back(text[static_cast<size_t>(from + i)]);
    } else if (random.below(mean_document) == 0) {
      text.push_back(kSep);
    } else {
      text.push_back(static_cast<uint32_t>(random.below(vocab)));
    }
  }
  text.resize(static_cast<size_t>(size));
  text.push_back(kSep);
  return text;
}

void random_texts() {
  Random random(1);
  const std::vector<uint32_t> vocabs = {1, 2, 3, 4, 5, 6, 7, 8, 255, 50000, 65535};
  const std::vector<int> threads = {1, 1, 1, 2, 8};
  for (int i = 0; i < 3000; ++i) {
    const uint32_t vocab = random.pick(vocabs);
    const int64_t size = random.below(i % 10 == 0 ? 1500 : 60);
    check_widths(random_text(random, size, vocab, 1 + random.below(40)), vocab,
                 random.pick(threads), "text " + std::to_string(i));
  }
}

void every_short_text() {
  for (int length = 0; length <= 7; ++length) {
    const int count = static_cast<int>(std::pow(3, length) + 0.5);
    for (int code = 0; code < count; ++code) {
      Ids text;
      for (int i = 0, rest = code; i < length; ++i, rest /= 3)
        text.push_back(rest % 3 == 2 ? kSep : static_cast<uint32_t>(rest % 3));
      text.push_back(kSep);
      check_widths(text, 2, 1, "code " + std::to_string(code));
    }
  }
}

Ids fibonacci_word(size_t size) {
  Ids a = {0}, b = {0, 1};
  while (b.size() < size) {
    Ids next = b;
    next.insert(next.end(), a.begin(), a.end());
    a.swap(b);
    b.swap(next);
  }
  b.resize(size);
  b.push_back(kSep);
  return b;
}

// Every position once, in ascending order of the suffixes.
bool ascending(const Ids& ids, const std::vector<uint32_t>& order) {
  std::vector<bool> seen(ids.size());
  for (size_t r = 0; r < order.size(); ++r) {
    if (order[r] >= ids.size() || seen[order[r]] || ids[order[r]] == kSep) return false;
    seen[order[r]] = true;
    if (r > 0 && !std::lexicographical_compare(ids.begin() + order[r - 1], ids.end(),
                                               ids.begin() + order[r], ids.end()))
      return false;
  }
  return order.size() == ids.size() - static_cast<size_t>(std::count(ids.begin(), ids.end(), kSep));
}

// Suffixes are equal for long: what separates linear from quadratic builders.
template <class Token>
void check_order(const Ids& ids, uint32_t vocab, const std::string& what) {
  const Guarded<Token> text = narrow<Token>(ids);
  std::vector<uint32_t> first;
  for (const int threads : {1, 2, 8}) {
    const ParallelFor parallel = threads == 1 ? serial_for() : threads_for(threads);
    for (const Build& build : builds()) {
      std::vector<uint32_t> out(ids.size());
      Progress progress;
      out.resize(build.run(SuffixJob{text.data(), sizeof(Token), ids.size(), vocab, out.data(),
                                     parallel, progress, 0}));
      if (first.empty()) {
        first = out;
        expect(ascending(ids, out), what + ": order");
      }
      expect(out == first,
             what + ": differs, " + build.name + ", threads " + std::to_string(threads));
    }
  }
}

void long_repeats() {
  Random random(2);
  const Ids document = random_text(random, 700, 1000, 100);
  Ids copies;
  for (int i = 0; i < 60; ++i) {
    copies.insert(copies.end(), document.begin(), document.end());
    if (i % 3 == 0) copies.push_back(static_cast<uint32_t>(random.below(1000)));
  }
  copies.push_back(kSep);
  Ids one_token(20000, 3);
  one_token.push_back(kSep);
  Ids separators(1000, kSep);
  check_order<uint16_t>(copies, 1000, "copies of a document");
  check_order<uint32_t>(copies, 1000, "copies of a document");
  check_order<uint8_t>(one_token, 4, "one token repeated");
  check_order<uint32_t>(one_token, 4, "one token repeated");
  check_order<uint16_t>(fibonacci_word(30000), 2, "Fibonacci word");
  check_order<uint8_t>(fibonacci_word(30000), 2, "Fibonacci word");
  check_order<uint16_t>(separators, 2, "separators only");
}

// More than what a thread sorts at a time.
void large_buckets() {
  Random random(3);
  for (const uint32_t vocab : {1u, 2u, 5u}) {
    Ids text;
    for (int i = 0; i < 150000; ++i)
      text.push_back(random.below(vocab == 1 ? 10 : 1000) == 0
                         ? kSep
                         : static_cast<uint32_t>(random.below(vocab)));
    text.push_back(kSep);
    check_widths(text, vocab, 2, "large buckets, vocabulary " + std::to_string(vocab));
  }
  // The more tokens before the separator, the smaller.
  Ids one_token(300000, 7), expected(one_token.size());
  one_token.push_back(kSep);
  std::iota(expected.begin(), expected.end(), 0u);
  check<uint8_t>(one_token, 8, expected, 2, "one token repeated");
  // Ties beyond the period of the sample, many of them in one group of it. By the linear builder,
  // since naive sorting takes long.
  Ids runs;
  for (int i = 0; i < 2200; ++i) {
    runs.insert(runs.end(), 200, 7);
    runs.push_back(static_cast<uint32_t>(random.below(6)));
  }
  runs.push_back(kSep);
  const Guarded<uint8_t> text = narrow<uint8_t>(runs);
  Progress progress;
  expected.resize(runs.size());
  expected.resize(build_sais(
      SuffixJob{text.data(), 1, runs.size(), 8, expected.data(), serial_for(), progress, 0}));
  check<uint8_t>(runs, 8, expected, 2, "long runs");
}

// A separator per token, ids at both ends of a large vocabulary.
void wide_vocabulary() {
  Random random(4);
  for (const uint32_t vocab : {70000u, 4194304u}) {
    Ids text;
    for (int i = 0; i < 3000; ++i)
      text.push_back(random.below(4) == 0 ? kSep
                                          : random.pick<uint32_t>({0, 1, 2, 65535, 65536, vocab / 2,
                                                                   vocab - 2, vocab - 1}));
    text.push_back(kSep);
    const Ids expected = naive(text);
    check<uint32_t>(text, vocab, expected, 2, "vocabulary " + std::to_string(vocab));
  }
}

// In every phase that the watching thread notices in time.
void cancelling() {
  Random random(5);
  const Ids ids = random_text(random, 400000, 20000, 1000);
  const Guarded<uint16_t> text = narrow<uint16_t>(ids);
  const ParallelFor parallel = threads_for(2);
  std::vector<uint32_t> out(ids.size());
  for (const Build& build : builds()) {
    int cancelled = 0;
    for (int phase = 0; phase < 5; ++phase) {
      Progress progress;
      progress.cancel = phase == 0;
      std::atomic<bool> ended{false};
      std::thread watcher([&] {
        while (!ended && progress.phase < phase) std::this_thread::yield();
        progress.cancel = true;
      });
      try {
        build.run(SuffixJob{text.data(), 2, ids.size(), 20000, out.data(), parallel, progress, 0});
      } catch (const Cancelled&) {
        ++cancelled;
      }
      ended = true;
      watcher.join();
    }
    expect(cancelled >= 2, std::string(build.name) + ": was not cancelled");
  }
}

void reporting() {
  Random random(6);
  const Ids ids = random_text(random, 300000, 3000, 300);
  const Guarded<uint16_t> text = narrow<uint16_t>(ids);
  const ParallelFor parallel = threads_for(2);
  std::vector<uint32_t> out(ids.size());
  for (const Build& build : builds()) {
    Progress progress;
    build.run(SuffixJob{text.data(), 2, ids.size(), 3000, out.data(), parallel, progress, 0});
    expect(progress.phase >= 2, std::string(build.name) + ": phases");
    expect(progress.done <= progress.total && progress.done > progress.total / 2,
           std::string(build.name) + ": progress " + std::to_string(progress.done) + " of " +
               std::to_string(progress.total));
  }
}

struct SinkFailed {};
void failing_sink() {
  const Ids ids = {1, 2, kSep};
  const Guarded<uint8_t> text = narrow<uint8_t>(ids);
  const ParallelFor parallel = serial_for();
  Progress progress;
  bool passed_on = false;
  try {
    build_radix_stream(SuffixJob{text.data(), 1, 3, 3, nullptr, parallel, progress, 1 << 24},
                       [](const uint32_t*, uint64_t) { throw SinkFailed(); });
  } catch (const SinkFailed&) {
    passed_on = true;
  }
  expect(passed_on, "the sink's exception reaches the caller");
}

const test::Register kTests[] = {{"suffix arrays of random texts", random_texts},
                                 {"suffix arrays of every short text", every_short_text},
                                 {"suffix arrays of long repeats", long_repeats},
                                 {"suffix arrays with large buckets", large_buckets},
                                 {"suffix arrays of wide vocabularies", wide_vocabulary},
                                 {"builders can be cancelled", cancelling},
                                 {"builders report progress", reporting},
                                 {"a failing sink ends the stream", failing_sink}};

}  // namespace
}  // namespace alignops::spans
