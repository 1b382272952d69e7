// The largest of any range of some numbers, in logarithmic time: a segment tree.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace alignops::spans {

class RangeMax {
 public:
  explicit RangeMax(const std::vector<double>& values)
      : size_(values.size()), tree_(2 * values.size()) {
    std::copy(values.begin(), values.end(), tree_.begin() + static_cast<int64_t>(size_));
    for (size_t i = size_; i-- > 1;) tree_[i] = std::max(tree_[2 * i], tree_[2 * i + 1]);
  }

  // Of values[first], ..., values[last], as far as they exist; 0 of none.
  double most(uint64_t first, uint64_t last) const {
    double out = 0;
    uint64_t begin = std::min<uint64_t>(first, size_) + size_,
             end = last < size_ ? last + 1 + size_ : 2 * size_;
    for (; begin < end; begin /= 2, end /= 2) {
      if (begin % 2 == 1) out = std::max(out, tree_[begin++]);
      if (end % 2 == 1) out = std::max(out, tree_[--end]);
    }
    return out;
  }

 private:
  size_t size_;
  std::vector<double> tree_;  // node i covers nodes 2 i and 2 i + 1; the values are the last ones
};

}  // namespace alignops::spans
