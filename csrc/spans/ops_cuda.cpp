// Searches in an index given as tensors, on CUDA tensors. The schemas are those of ops_search.cpp.
// Nothing waits for the GPU, so values are not looked at: see cuda/launch.h.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <tuple>

#include "../common/ops_cuda.h"
#include "cuda/launch.h"
#include "ops_index.h"

namespace alignops::spans {
namespace {

// The index and the rows of an op, checked. Everything lies where the text does.
struct Arguments {
  Arguments(const char* op, const Tensor& text, const Tensor& suf, const Tensor& first,
            const Tensor& tokens, const Tensor& offsets)
      : gpu(text, op, "text") {
    rows.index = index_view(text, suf, first, op, gpu.device());
    rows.rows = check_ragged(tokens, offsets, op, gpu.device());
    rows.tokens = tokens.const_data_ptr<int64_t>();
    rows.total = tokens.size(0);
    rows.offsets = offsets.const_data_ptr<int64_t>();
  }

  Gpu gpu;
  cuda::RowArgs rows{};
};

Tensor find(const Tensor& text, const Tensor& suf, const Tensor& first, const Tensor& tokens,
            const Tensor& offsets) {
  Arguments args("spans_find", text, suf, first, tokens, offsets);
  Tensor out = torch::stable::new_empty(tokens, {args.rows.rows, 2});
  args.gpu.check_launch(cuda::find(args.rows, out.mutable_data_ptr<int64_t>(), args.gpu.launch()));
  return out;
}

Tensor next_counts(const Tensor& text, const Tensor& suf, const Tensor& first, const Tensor& tokens,
                   const Tensor& offsets, const Tensor& cand) {
  const char* op = "spans_next_counts";
  Arguments args(op, text, suf, first, tokens, offsets);
  const int64_t width = check_candidates(cand, args.rows.rows, op, args.gpu.device());
  Tensor out = torch::stable::new_empty(cand, {args.rows.rows, width});
  args.gpu.check_launch(cuda::next_counts(args.rows, cand.const_data_ptr<int64_t>(), width,
                                          out.mutable_data_ptr<int64_t>(), args.gpu.launch()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> peek(const Tensor& text, const Tensor& suf,
                                                const Tensor& first, const Tensor& tokens,
                                                const Tensor& offsets, const Tensor& cand,
                                                const Tensor& surprisal, double tau,
                                                int64_t min_len, int64_t max_count) {
  const char* op = "spans_peek";
  Arguments args(op, text, suf, first, tokens, offsets);
  const int64_t width = check_candidates(cand, args.rows.rows, op, args.gpu.device());
  check_layout(surprisal, ScalarType::Double, {static_cast<int64_t>(args.rows.index.vocab)}, op,
               "surprisal", args.gpu.device());
  check_rule(tau, min_len, max_count, op);
  const auto shape = cand.sizes();
  Tensor flag = torch::stable::new_empty(cand, shape, ScalarType::Bool);
  Tensor length = torch::stable::new_empty(cand, shape);
  Tensor count = torch::stable::new_empty(cand, shape);
  Tensor bci = torch::stable::new_empty(cand, shape, ScalarType::Double);
  const cuda::PeekArgs peek_args{cand.const_data_ptr<int64_t>(),
                                 width,
                                 surprisal.const_data_ptr<double>(),
                                 tau,
                                 min_len,
                                 max_count,
                                 flag.mutable_data_ptr<bool>(),
                                 length.mutable_data_ptr<int64_t>(),
                                 count.mutable_data_ptr<int64_t>(),
                                 bci.mutable_data_ptr<double>()};
  args.gpu.check_launch(cuda::peek(args.rows, peek_args, args.gpu.launch()));
  return {flag, length, count, bci};
}

}  // namespace
}  // namespace alignops::spans

STABLE_TORCH_LIBRARY_IMPL(alignops, CUDA, m) {
  m.impl("spans_find", TORCH_BOX(&alignops::spans::find));
  m.impl("spans_next_counts", TORCH_BOX(&alignops::spans::next_counts));
  m.impl("spans_peek", TORCH_BOX(&alignops::spans::peek));
}
