// An index as tensors, for the CPU and the CUDA ops: checks of everything but values.
//
// text is uint8, uint16 or uint32 (T), documents that each end in the largest number of the type;
// suf uint32 (N), or uint8 (N, 5) for packed pointers; first int64 (V + 1), the ranks where the
// suffixes that start with each token begin.
#pragma once

#include <cmath>

#include "../common/ops_common.h"
#include "kernels.h"

namespace alignops::spans {

inline int32_t token_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::UInt16:
      return 2;
    case ScalarType::UInt32:
      return 4;
    default:
      return 0;
  }
}

inline Shard index_view(const Tensor& text, const Tensor& suf, const Tensor& first, const char* op,
                        int32_t device) {
  const int32_t width = token_bytes(text.scalar_type());
  ALIGNOPS_CHECK(width > 0, op, ": text must be uint8, uint16 or uint32, got ",
                 dtype_name(text.scalar_type()));
  ALIGNOPS_CHECK(text.dim() == 1, op, ": text must have one dimension, got shape ",
                 shape_string(text.sizes()));
  check_layout(text, text.scalar_type(), text.sizes(), op, "text", device);
  const bool packed = suf.scalar_type() == ScalarType::Byte;
  ALIGNOPS_CHECK(suf.dim() == (packed ? 2 : 1), op,
                 ": suf must be uint32 (n,) or uint8 (n, 5), got ", dtype_name(suf.scalar_type()),
                 " of shape ", shape_string(suf.sizes()));
  const int64_t suffixes = suf.size(0), size = text.size(0);
  if (packed) {
    check_layout(suf, ScalarType::Byte, {suffixes, 5}, op, "suf", device);
  } else {
    check_layout(suf, ScalarType::UInt32, {suffixes}, op, "suf", device);
  }
  ALIGNOPS_CHECK(suffixes <= size, op, ": suf must be no longer than text, ", size, ", got ",
                 suffixes);
  ALIGNOPS_CHECK(first.dim() == 1 && first.size(0) >= 1, op,
                 ": first must have shape (vocab_size + 1,), got ", shape_string(first.sizes()));
  check_layout(first, ScalarType::Long, first.sizes(), op, "first", device);
  const int64_t vocab = first.size(0) - 1;
  ALIGNOPS_CHECK(static_cast<uint64_t>(vocab) <= separator(width), op, ": first must have at most ",
                 separator(width) + 1, " elements for this text, got ", vocab + 1);
  const Guard verified{nullptr, nullptr, nullptr};
  return {text.const_data_ptr(),
          static_cast<uint64_t>(size),
          width,
          verified,
          suf.const_data_ptr(),
          static_cast<uint64_t>(suffixes),
          packed ? 5 : 4,
          verified,
          static_cast<uint64_t>(vocab),
          nullptr,
          reinterpret_cast<const uint64_t*>(first.const_data_ptr<int64_t>()),
          static_cast<uint64_t>(vocab),
          nullptr,
          0};
}

// Rows of token ids: int64, offsets (rows + 1). Returns the number of rows.
inline int64_t check_ragged(const Tensor& tokens, const Tensor& offsets, const char* op,
                            int32_t device) {
  ALIGNOPS_CHECK(tokens.dim() == 1, op, ": tokens must have one dimension, got shape ",
                 shape_string(tokens.sizes()));
  check_layout(tokens, ScalarType::Long, tokens.sizes(), op, "tokens", device);
  ALIGNOPS_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, op,
                 ": offsets must have shape (rows + 1,), got ", shape_string(offsets.sizes()));
  check_layout(offsets, ScalarType::Long, offsets.sizes(), op, "offsets", device);
  return offsets.size(0) - 1;
}

// Candidates of each row, (rows, width). Returns the width.
inline int64_t check_candidates(const Tensor& cand, int64_t rows, const char* op, int32_t device) {
  ALIGNOPS_CHECK(cand.dim() == 2 && cand.size(0) == rows, op, ": cand must have shape (", rows,
                 ", width), got ", shape_string(cand.sizes()));
  check_layout(cand, ScalarType::Long, cand.sizes(), op, "cand", device);
  return cand.size(1);
}

// Of spans_peek, apart from its tensors.
inline void check_rule(double tau, int64_t min_len, int64_t max_count, const char* op) {
  ALIGNOPS_CHECK(std::isfinite(tau), op, ": tau must be finite, got ", tau);
  ALIGNOPS_CHECK(min_len >= 1, op, ": min_len must be positive, got ", min_len);
  ALIGNOPS_CHECK(max_count >= 1, op, ": max_count must be positive, got ", max_count);
}

}  // namespace alignops::spans
