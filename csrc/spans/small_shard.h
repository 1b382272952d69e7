// A shard in memory whose suffixes are sorted by comparison: for the self-test and for C++ tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace alignops::spans {

class SmallShard {
 public:
  struct Options {
    int32_t token_bytes = 2;
    int32_t pointer_bytes = 4;
    uint64_t vocab = 0;  // larger than any token but SEP
    bool sparse = false;
    bool directory = false;
    uint64_t removed_from = UINT64_MAX;  // documents from this position on are removed
  };

  // `text` holds SEP as kSep, whatever the width, and ends with it.
  static constexpr uint32_t kSep = 0xFFFFFFFFu;

  SmallShard(const std::vector<uint32_t>& text, const Options& options)
      : options_(options), text_size_(text.size()) {
    const auto sep = static_cast<uint32_t>(separator(options.token_bytes));
    std::vector<uint32_t> tokens(text);
    std::replace(tokens.begin(), tokens.end(), kSep, sep);
    std::vector<uint64_t> count(options.vocab);
    for (uint64_t i = 0; i < tokens.size(); ++i) {
      append(text_, tokens[i], options.token_bytes);
      if (tokens[i] == sep) continue;
      suffixes_.push_back(i);
      ++count[tokens[i]];
    }
    std::sort(suffixes_.begin(), suffixes_.end(), [&](uint64_t a, uint64_t b) {
      const auto at = [&](uint64_t i) { return tokens.begin() + static_cast<int64_t>(i); };
      return std::lexicographical_compare(at(a), tokens.end(), at(b), tokens.end());
    });
    for (const uint64_t position : suffixes_) append(suf_, position, options.pointer_bytes);
    for (uint64_t r = 0; r < suffixes_.size(); ++r)
      if (suffixes_[r] >= options.removed_from) removed_.push_back(r);
    first_.push_back(0);
    for (uint64_t t = 0; t < options.vocab; ++t) {
      if (options.sparse && count[t] == 0) continue;
      if (options.sparse) ids_.push_back(static_cast<uint32_t>(t));
      first_.push_back(first_.back() + count[t]);
    }
    for (uint64_t r = 0; options.directory && r < suffixes_.size(); r += kDirectoryStride) {
      for (uint64_t j = suffixes_[r]; j < suffixes_[r] + kDirectoryTokens; ++j)
        append(directory_, j < tokens.size() ? tokens[j] : sep, options.token_bytes);
    }
  }

  Shard view() const {
    const Guard whole{nullptr, nullptr, nullptr};
    const uint64_t entry = kDirectoryTokens * static_cast<uint64_t>(options_.token_bytes);
    return {text_.data(),
            text_size_,
            options_.token_bytes,
            whole,
            suf_.data(),
            suffixes_.size(),
            options_.pointer_bytes,
            whole,
            options_.vocab,
            options_.sparse ? ids_.data() : nullptr,
            first_.data(),
            first_.size() - 1,
            options_.directory ? directory_.data() : nullptr,
            options_.directory ? directory_.size() / entry : 0,
            removed_.data(),
            removed_.size()};
  }

  const std::vector<uint64_t>& suffixes() const { return suffixes_; }

  // Tokens in the width of the text, with the padding that kernels ask for.
  std::vector<uint8_t> tokens(const std::vector<uint32_t>& ids) const {
    std::vector<uint8_t> out;
    for (const uint32_t id : ids) append(out, id, options_.token_bytes);
    out.resize(out.size() + kQueryPadding);
    return out;
  }

 private:
  static void append(std::vector<uint8_t>& out, uint64_t value, int32_t bytes) {
    for (int32_t i = 0; i < bytes; ++i) out.push_back(static_cast<uint8_t>(value >> (8 * i)));
  }

  Options options_;
  uint64_t text_size_;
  std::vector<uint64_t> suffixes_, first_, removed_;
  std::vector<uint32_t> ids_;
  std::vector<uint8_t> text_, suf_, directory_;
};

}  // namespace alignops::spans
