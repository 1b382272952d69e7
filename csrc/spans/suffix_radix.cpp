// Suffix array by radix sorting, on all threads.
//
//   1 rank a sample of the suffixes (suffix_sample.h)
//   2 bucket all positions by first token
//   3 sort every bucket by the next tokens in 64-bit keys; what is equal for a period of the sample
//     is ordered by ranks (suffix_keys.h)
//
// Buckets are independent, so steps 2 and 3 may take any range of the order at a time: the stream
// cuts the order at suffixes from all over the text, chosen so that every batch fits into memory.
// It reads the text twice per batch from front to back, then at the batch's positions.
#include <algorithm>
#include <numeric>
#include <optional>

#include "suffix.h"
#include "suffix_sample.h"

namespace alignops::spans {
namespace {

constexpr uint32_t kShortPeriod = 64, kLongPeriod = 4096;

template <class Token>
struct ByRank {
  const Sample<Token>& sample;
  uint64_t depth;
  Watch& watch;

  void group(uint32_t* positions, uint64_t size) const {
    uint32_t compared = 0;
    std::sort(positions, positions + size, [&](uint32_t p, uint32_t q) {
      if (++compared % kPollEvery == 0) watch.poll();
      return sample.less(p, q, depth);
    });
  }
  int pair(uint32_t p, uint32_t q, uint64_t equal) const {
    return sample.less(p, q, equal) ? -1 : 1;
  }
};

template <class Token>
bool is_separator(Token token) {
  return token == TokenBuckets<Token>::kSeparator;
}

template <class Token>
uint64_t build(const SuffixJob& job) {
  const uint64_t n = job.text_size;
  if (n == 0) return 0;
  Watch watch(job.progress);
  advise_huge(job.out, n * sizeof(uint32_t));
  populate(job.parallel, watch, job.out, n);
  const DifferenceCover cover(kShortPeriod);
  const PaddedText<Token> text(job.text, n, cover.period());
  const TokenBuckets<Token> buckets(job.vocab);
  // The output is free as yet. In a very short text the sample may be most of it.
  const uint64_t count = cover.count_below(n);
  HugeVector<uint32_t> owned(2 * count > n ? 2 * count : 0);
  uint32_t* const work = 2 * count > n ? owned.data() : job.out;
  const Sample<Token> sample(text, cover, buckets, job.parallel, watch, work, work + count,
                             sort_capacity(n));
  watch.start(3 * n);
  Collector<Token> collector(text, buckets, job.parallel, watch);
  const uint64_t size = collector.collect(
      [&](uint64_t begin, uint64_t end, const auto& emit) {
        for (uint64_t p = begin; p < end; ++p)
          if (!is_separator(text[p])) emit(p);
      },
      job.out);
  collector.sort(job.out, ByRank<Token>{sample, cover.period(), watch}, sort_capacity(n));
  return size;
}

// -------------------------------------------------------------------------------------------------
// The stream.

// Memory besides the sample and the batch, and for the smallest batch.
constexpr uint64_t kStreamSort = uint64_t{1} << 15;
uint64_t stream_fixed_bytes(uint64_t vocab) {
  return counter_bytes(vocab) + kStreamSort * sort_entry_bytes() * sort_threads() + (4 << 20);
}
uint64_t smallest_batch(uint64_t text_size) { return text_size / 256 + 4096; }

uint64_t sample_bytes(uint64_t text_size, uint32_t period) {
  return 3 * sizeof(uint32_t) * DifferenceCover(period).count_below(text_size);
}

// Cuts of the order: piece k of all suffixes lies between cut k - 1, included, and cut k.
template <class Token>
class Cuts {
 public:
  Cuts(const PaddedText<Token>& text, const TokenBuckets<Token>& buckets,
       const Sample<Token>& sample, uint64_t count)
      : text_(text), buckets_(buckets), sample_(sample) {
    // Positions as if drawn at random: regular ones could miss what is frequent in a regular text.
    for (uint64_t i = 1; i <= count; ++i) {
      const uint64_t p = scatter(i) % text.size();
      if (!is_separator(text[p])) cuts_.push_back(static_cast<uint32_t>(p));
    }
    std::sort(cuts_.begin(), cuts_.end(),
              [&](uint32_t p, uint32_t q) { return sample.less(p, q, 0); });
    cuts_.erase(std::unique(cuts_.begin(), cuts_.end()), cuts_.end());
    first_.assign(buckets.size() + 1, 0);
    for (const uint32_t cut : cuts_) ++first_[buckets(text[cut]) + 1];
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
  }

  uint64_t pieces() const { return cuts_.size() + 1; }

  uint64_t piece(uint32_t p) const {
    const uint32_t bucket = buckets_(text_[p]);
    const auto begin = cuts_.begin() + first_[bucket], end = cuts_.begin() + first_[bucket + 1];
    return static_cast<uint64_t>(
        std::upper_bound(begin, end, p,
                         [&](uint32_t a, uint32_t b) { return sample_.less(a, b, 0); }) -
        cuts_.begin());
  }
  // Is p in the pieces [begin, end)?
  bool within(uint32_t p, uint64_t begin, uint64_t end) const {
    const uint32_t bucket = buckets_(text_[p]);
    const uint64_t lowest = first_[bucket], highest = first_[bucket + 1];
    if (highest < begin || lowest >= end) return false;
    return (lowest >= begin || !sample_.less(p, cuts_[begin - 1], 0)) &&
           (highest < end || sample_.less(p, cuts_[end - 1], 0));
  }

 private:
  // splitmix64
  static uint64_t scatter(uint64_t i) {
    uint64_t x = i * 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
  }

  const PaddedText<Token>& text_;
  const TokenBuckets<Token>& buckets_;
  const Sample<Token>& sample_;
  std::vector<uint32_t> cuts_, first_;
};

template <class Token>
uint64_t build_stream(const SuffixJob& job, const SuffixSink& sink) {
  const uint64_t n = job.text_size;
  if (n == 0) return 0;
  Watch watch(job.progress);
  // The shortest period that leaves room for a sixteenth of the array; else the longest.
  const uint64_t fixed = stream_fixed_bytes(job.vocab);
  uint32_t period = kShortPeriod;
  while (period < kLongPeriod &&
         fixed + sample_bytes(n, period) + n / 16 * sizeof(uint32_t) > job.mem_bytes)
    period *= 2;
  const DifferenceCover cover(period);
  const PaddedText<Token> text(job.text, n, period);
  const TokenBuckets<Token> buckets(job.vocab);
  const uint64_t count = cover.count_below(n);
  HugeVector<uint32_t> work(2 * count);
  populate(job.parallel, watch, work.data(), 2 * count);
  const Sample<Token> sample(text, cover, buckets, job.parallel, watch, work.data(),
                             work.data() + count, kStreamSort);
  work.resize(0);
  const uint64_t kept = fixed + count * sizeof(uint32_t);
  const uint64_t room = std::max(
      job.mem_bytes > kept ? (job.mem_bytes - kept) / sizeof(uint32_t) : 0, smallest_batch(n));

  Collector<Token> collector(text, buckets, job.parallel, watch);
  std::vector<uint64_t> ends;  // pieces of the batches, and how many suffixes they hold
  uint64_t size = 0, largest = 0;
  std::optional<Cuts<Token>> cuts;
  for (uint64_t wanted = n <= room ? 0 : 32 * (n / room + 1);; wanted *= 4) {
    cuts.emplace(text, buckets, sample, wanted);
    watch.start(n);
    std::vector<std::vector<uint64_t>> found(collector.slices(),
                                             std::vector<uint64_t>(cuts->pieces()));
    collector.each_piece([&](uint64_t slice, uint64_t begin, uint64_t end) {
      for (uint64_t p = begin; p < end; ++p)
        if (!is_separator(text[p])) ++found[slice][cuts->piece(static_cast<uint32_t>(p))];
    });
    ends.clear();
    size = largest = 0;
    uint64_t batch = 0;
    for (uint64_t piece = 0; piece < cuts->pieces(); ++piece) {
      uint64_t in_piece = 0;
      for (const auto& slice : found) in_piece += slice[piece];
      if (batch + in_piece > room) {
        ends.push_back(piece);
        batch = 0;
      }
      batch += in_piece;
      size += in_piece;
      largest = std::max(largest, batch);
    }
    ends.push_back(cuts->pieces());
    if (largest <= room || wanted > n) break;
  }

  watch.start(2 * n * ends.size() + size);
  HugeVector<uint32_t> positions(largest);
  populate(job.parallel, watch, positions.data(), largest);
  uint64_t first = 0;
  for (const uint64_t last : ends) {
    const uint64_t in_batch = collector.collect(
        [&](uint64_t begin, uint64_t end, const auto& emit) {
          for (uint64_t p = begin; p < end; ++p)
            if (!is_separator(text[p]) && cuts->within(static_cast<uint32_t>(p), first, last))
              emit(p);
        },
        positions.data());
    collector.sort(positions.data(), ByRank<Token>{sample, cover.period(), watch}, kStreamSort);
    sink(positions.data(), in_batch);
    first = last;
  }
  return size;
}

}  // namespace

uint64_t radix_bytes(uint64_t text_size, int32_t token_bytes, uint64_t vocab) {
  const uint64_t sample = DifferenceCover(kShortPeriod).count_below(text_size);
  return text_size * (static_cast<uint64_t>(token_bytes) + sizeof(uint32_t)) +
         sample * sizeof(uint32_t) + counter_bytes(vocab) +
         sort_capacity(text_size) * sort_entry_bytes() * sort_threads() + (4 << 20);
}

uint64_t radix_stream_bytes(uint64_t text_size, int32_t, uint64_t vocab) {
  return stream_fixed_bytes(vocab) + sample_bytes(text_size, kLongPeriod) +
         smallest_batch(text_size) * sizeof(uint32_t);
}

uint64_t build_radix(const SuffixJob& job) {
  switch (job.token_bytes) {
    case 1:
      return build<uint8_t>(job);
    case 2:
      return build<uint16_t>(job);
    default:
      return build<uint32_t>(job);
  }
}

uint64_t build_radix_stream(const SuffixJob& job, const SuffixSink& sink) {
  switch (job.token_bytes) {
    case 1:
      return build_stream<uint8_t>(job, sink);
    case 2:
      return build_stream<uint16_t>(job, sink);
    default:
      return build_stream<uint32_t>(job, sink);
  }
}

}  // namespace alignops::spans
