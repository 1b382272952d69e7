// What the ops of verification share: logits of a batch, values of its rows, threads, results.
#pragma once

#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "../common/ops_common.h"
#include "../common/torch_parallel.h"
#include "rules.h"

namespace alignops::speculative {

inline constexpr size_t kMaxEos = 8;

template <class T>
inline constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kScalarType<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType kScalarType<uint32_t> = ScalarType::UInt32;
template <>
inline constexpr ScalarType kScalarType<uint8_t> = ScalarType::Byte;
template <>
inline constexpr ScalarType kScalarType<bool> = ScalarType::Bool;

// The data of an optional tensor of this shape; null where there is none.
template <class T>
const T* data_or_null(const std::optional<Tensor>& t, std::initializer_list<int64_t> shape,
                      const char* op, const char* argument) {
  if (!t.has_value()) return nullptr;
  check_layout(*t, kScalarType<T>, shape, op, argument);
  return static_cast<const T*>(t->const_data_ptr());
}

template <class T>
T value_or(const T* values, int64_t i, T otherwise) {
  return values != nullptr ? values[i] : otherwise;
}

inline void check_unit_stride(const Tensor& t, const char* op, const char* argument) {
  const int64_t last = t.dim() - 1;
  ALIGNOPS_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, ": ", argument,
                 " must have stride 1 in the last dimension, got strides ",
                 shape_string(t.strides()));
}

// (b, n, size) with any outer strides.
struct Batch {
  Rows rows;  // of the first sequence
  int64_t stride = 0;

  Rows of(int64_t b) const {
    Rows out = rows;
    if (out.data != nullptr)
      out.data = static_cast<const char*>(rows.data) + b * stride * dtype_bytes(rows.dtype);
    return out;
  }
};

inline Batch as_batch(const Tensor& t, bool probabilities, const char* op, const char* argument) {
  check_device(t, kCpu, op, argument);
  const DType dtype = float_dtype(t.scalar_type(), op, argument);
  check_unit_stride(t, op, argument);
  const int64_t last = t.dim() - 1, size = t.size(last);
  ALIGNOPS_CHECK(size > 0 && size <= INT32_MAX, op, ": ", argument,
                 " must have 1 to 2^31 - 1 ids in the last dimension, got shape ",
                 shape_string(t.sizes()));
  const Rows rows{t.const_data_ptr(), dtype, probabilities, t.stride(last - 1), size};
  return {rows, last == 2 ? t.stride(0) : 0};
}

// Logits of the drafter, (b, n, size) with size at most that of the target.
inline Batch as_draft(const std::optional<Tensor>& t, int64_t b, int64_t n, int64_t size,
                      bool probabilities, const char* op) {
  if (!t.has_value()) return {};
  ALIGNOPS_CHECK(t->dim() == 3 && t->size(0) == b && t->size(1) == n, op,
                 ": draft must have shape (", b, ", ", n, ", ids), got ", shape_string(t->sizes()));
  const Batch batch = as_batch(*t, probabilities, op, "draft");
  ALIGNOPS_CHECK(batch.rows.size <= size, op, ": draft must have at most the ", size,
                 " ids of target, got ", batch.rows.size);
  return batch;
}

struct Warps {
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;

  Warp of(int64_t b) const {
    return {value_or(temperature, b, 1.0f), value_or(top_k, b, 0), value_or(top_p, b, 1.0f),
            value_or(min_p, b, 0.0f)};
  }
};

inline Warps as_warps(const std::optional<Tensor>& temperature, const std::optional<Tensor>& top_k,
                      const std::optional<Tensor>& top_p, const std::optional<Tensor>& min_p,
                      int64_t b, bool probabilities, const char* op) {
  const Warps warps{data_or_null<float>(temperature, {b}, op, "temperature"),
                    data_or_null<int32_t>(top_k, {b}, op, "top_k"),
                    data_or_null<float>(top_p, {b}, op, "top_p"),
                    data_or_null<float>(min_p, {b}, op, "min_p")};
  for (const auto& [given, argument] :
       {std::pair{warps.top_k != nullptr, "top_k"}, std::pair{warps.top_p != nullptr, "top_p"},
        std::pair{warps.min_p != nullptr, "min_p"}})
    ALIGNOPS_CHECK(!probabilities || !given, op, ": ", argument,
                   " must not be given for probabilities, got a tensor");
  return warps;
}

inline void check_eos(const std::vector<int64_t>& eos_ids, const char* op) {
  ALIGNOPS_CHECK(eos_ids.size() <= kMaxEos, op, ": eos_ids must be at most ", kMaxEos, " ids, got ",
                 eos_ids.size());
}

// Calls body(workspace, row) for all rows. Threads take rows as they become free, because a row
// ends at the first draft that is not accepted; where rows are few, they share the tiles of each.
template <class Body>
void for_rows(int64_t rows, int64_t size, int64_t draft_size, bool rests, const Body& body) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const bool share_tiles = 2 * rows <= threads;
  const ParallelFor pool = torch_parallel_for(), serial = serial_for();
  const int64_t workers = share_tiles ? 1 : std::min(rows, threads);
  const Kernels& table = kernels();
  std::vector<Workspace> workspaces;
  workspaces.reserve(static_cast<size_t>(workers));
  for (int64_t i = 0; i < workers; ++i)
    workspaces.emplace_back(table, share_tiles ? pool : serial, size, draft_size, rests);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t b = next++; b < rows; b = next++) body(workspaces[static_cast<size_t>(i)], b);
  };
  if (workers == 1) {
    work(0, 1);
  } else {
    pool(0, workers, 1, work);
  }
}

// What verification returns: rows of `width` emitted tokens, at first empty.
struct Results {
  int64_t rows, width;
  Tensor accept_len, next_token, num_emitted, tokens, cu_emitted, flat, source, finished, row_error,
      state, zero_q;

  Results(const Tensor& like, int64_t b, int64_t n)
      : rows(b),
        width(n),
        accept_len(make(like, {b}, ScalarType::Int)),
        next_token(make(like, {b}, ScalarType::Long)),
        num_emitted(make(like, {b}, ScalarType::Int)),
        tokens(make(like, {b, n}, ScalarType::Long)),
        cu_emitted(make(like, {b + 1}, ScalarType::Int)),
        flat(make(like, {b * n}, ScalarType::Long)),
        source(make(like, {b, n}, ScalarType::Byte)),
        finished(make(like, {b}, ScalarType::Byte)),
        row_error(make(like, {b}, ScalarType::Byte)),
        state(make(like, {b}, ScalarType::Byte)),
        zero_q(make(like, {b}, ScalarType::Int)) {}

  Emitted begin(int64_t b, uint8_t state_of_row) const {
    Emitted out{tokens.mutable_data_ptr<int64_t>() + b * width,
                source.mutable_data_ptr<uint8_t>() + b * width};
    out.state = state_of_row;
    return out;
  }

  void end(int64_t b, const Emitted& out) const {
    for (int64_t i = out.count; i < width; ++i) {
      out.tokens[i] = -1;
      out.sources[i] = 0;
    }
    accept_len.mutable_data_ptr<int32_t>()[b] = static_cast<int32_t>(out.accepted);
    next_token.mutable_data_ptr<int64_t>()[b] =
        out.count > out.accepted ? out.tokens[out.accepted] : -1;
    num_emitted.mutable_data_ptr<int32_t>()[b] = static_cast<int32_t>(out.count);
    finished.mutable_data_ptr<uint8_t>()[b] = static_cast<uint8_t>(out.finished);
    row_error.mutable_data_ptr<uint8_t>()[b] = static_cast<uint8_t>(out.error);
    state.mutable_data_ptr<uint8_t>()[b] = out.state;
    zero_q.mutable_data_ptr<int32_t>()[b] = out.error == RowError::kNone ? out.zero_q : 0;
  }

  // After all rows have ended.
  void flatten() const {
    const auto* count = num_emitted.const_data_ptr<int32_t>();
    const auto* from = tokens.const_data_ptr<int64_t>();
    auto* cu = cu_emitted.mutable_data_ptr<int32_t>();
    auto* to = flat.mutable_data_ptr<int64_t>();
    std::fill_n(to, rows * width, int64_t{-1});
    cu[0] = 0;
    for (int64_t b = 0; b < rows; ++b) {
      cu[b + 1] = cu[b] + count[b];
      std::copy_n(from + b * width, count[b], to + cu[b]);
    }
  }

 private:
  static Tensor make(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(like, std::vector<int64_t>(shape), dtype);
  }
};

// Seeds and positions of the generator: both or none.
struct Seeds {
  const int64_t* seeds;
  const int64_t* positions;

  Seeds(const std::optional<Tensor>& seed, const std::optional<Tensor>& position, int64_t b,
        bool needed, const char* op) {
    ALIGNOPS_CHECK(seed.has_value() || !needed, op, ": seeds must be given for this rule");
    ALIGNOPS_CHECK(seed.has_value() == position.has_value(), op,
                   ": positions must be given with seeds, and only then");
    seeds = data_or_null<int64_t>(seed, {b}, op, "seeds");
    positions = data_or_null<int64_t>(position, {b}, op, "positions");
  }
};

}  // namespace alignops::speculative
