// What the ternary ops share: checks of their arguments, segments.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/ops_common.h"
#include "kernels.h"

namespace alignops::ternary {

// Stride 1 or 16; scale groups of k columns, or of a multiple of 32 (64) columns.
inline void check_group(int64_t k, int64_t group, int64_t stride, const char* op) {
  ALIGNOPS_CHECK(stride == 1 || stride == 16, op, ": stride must be 1 or 16, got ", stride);
  ALIGNOPS_CHECK(stride == 1 || k % 64 == 0, op, ": k must be a multiple of 64 for stride 16, got ",
                 k);
  const int64_t unit = stride == 1 ? 32 : 64;
  ALIGNOPS_CHECK(group == k || (group > 0 && group < k && group % unit == 0), op,
                 ": group must be a multiple of ", unit, " below k=", k, ", or k, got ", group);
}

inline Act act_mode(int64_t act, const char* op) {
  ALIGNOPS_CHECK(act >= 0 && act <= 3, op,
                 ": act must be 0 (none), 1 (a8), 2 (a8g) or 3 (a16), got ", act);
  return static_cast<Act>(act);
}

struct Bias {
  const void* data;  // null without a bias
  DType dtype;
};

// A bias of n elements, float32 or of x's dtype.
inline Bias as_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t n, const char* op,
                    int32_t device = kCpu) {
  if (!bias.has_value()) return {nullptr, DType::kFloat32};
  const bool same = bias->scalar_type() == x.scalar_type();
  check_layout(*bias, same ? x.scalar_type() : ScalarType::Float, {n}, op, "bias", device);
  return {bias->const_data_ptr(), float_dtype(bias->scalar_type(), op, "bias")};
}

// The intervals of a row's blocks that have one activation scale and one weight scale; `blocks`
// includes padding. group >= k stands for one weight scale per row.
inline std::vector<Segment> make_segments(int64_t k, int64_t blocks, int64_t group, Act act) {
  const int64_t weight_blocks = group >= k ? blocks : group / 4;
  const int64_t act_blocks = act == Act::kA8G ? kActGroupColumns / 4 : blocks;
  const int64_t last_weight = group >= k ? 0 : ceil_div(k, group) - 1;
  const int64_t last_act = act == Act::kA8G ? ceil_div(k, kActGroupColumns) - 1 : 0;
  std::vector<Segment> segments;
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t weight = std::min(begin / weight_blocks, last_weight);
    const int64_t act_group = std::min(begin / act_blocks, last_act);
    int64_t end = blocks;
    if (weight < last_weight) end = std::min(end, (weight + 1) * weight_blocks);
    if (act_group < last_act) end = std::min(end, (act_group + 1) * act_blocks);
    segments.push_back({begin, end, act_group, weight});
    begin = end;
  }
  return segments;
}

}  // namespace alignops::ternary
