#include "torch_parallel.h"

#include <torch/csrc/stable/ops.h>

namespace alignops {

ParallelFor torch_parallel_for() {
  return [](int64_t begin, int64_t end, int64_t grain,
            const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(begin, end, grain,
                                [&body](int64_t b, int64_t e) noexcept { body(b, e); });
  };
}

}  // namespace alignops
