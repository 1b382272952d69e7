// The penalty of Contrastive Belief Deconfliction: per row the sum over its tokens of a_t u_t,
// where a_t is a weight and u_t grows with the log-probability of the token.
//
// u = -ln(1 - p), with ln p at most -1e-6 (unlikelihood), or u = ln p, at least -20 (logp). Few
// tokens have a weight, only they are computed; rows are summed in double, in order.
#include <atomic>
#include <cmath>
#include <vector>

#include "../common/float16.h"
#include "../common/ops_common.h"

namespace alignops::spans {
namespace {

enum class Carrier : int64_t { kUnlikelihood = 0, kLogp = 1 };

constexpr double kLargest = -1e-6, kLeast = -20, kTolerance = 1e-4, kHalf = -0.6931471805599453;

double carried(double logp, Carrier carrier) {
  if (carrier == Carrier::kLogp) return std::max(logp, kLeast);
  const double l = std::min(logp, kLargest);
  return l > kHalf ? -std::log(-std::expm1(l)) : -std::log1p(-std::exp(l));
}

double load(const void* p, ScalarType dtype, int64_t i) {
  switch (dtype) {
    case ScalarType::Double:
      return static_cast<const double*>(p)[i];
    case ScalarType::BFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
    case ScalarType::Half:
      return fp16_to_float(static_cast<const uint16_t*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

Tensor cbd_penalty(const Tensor& logps, const Tensor& mask, const Tensor& weights,
                   int64_t carrier_code) {
  const char* op = "spans_cbd_penalty";
  check_device(logps, kCpu, op, "logps");
  const ScalarType dtype = logps.scalar_type();
  ALIGNOPS_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                     dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                 op, ": logps must be float32, float64, bfloat16 or float16, got ",
                 dtype_name(dtype));
  const auto shape = logps.sizes();
  ALIGNOPS_CHECK(shape.size() >= 1, op, ": logps must have at least one dimension, got a scalar");
  check_layout(mask, ScalarType::Bool, shape, op, "mask");
  check_layout(weights, ScalarType::Float, shape, op, "weights");
  ALIGNOPS_CHECK(carrier_code == 0 || carrier_code == 1, op,
                 ": carrier must be 0 (unlikelihood) or 1 (logp), got ", carrier_code);
  const auto carrier = static_cast<Carrier>(carrier_code);

  std::vector<int64_t> out_shape(shape.begin(), shape.end());
  const int64_t width = out_shape.back();
  out_shape.pop_back();
  int64_t rows = 1;
  for (const int64_t n : out_shape) rows *= n;
  const Tensor source = logps.is_contiguous() ? logps : torch::stable::contiguous(logps);
  const bool wide = dtype == ScalarType::Double;
  Tensor out =
      torch::stable::new_empty(logps, out_shape, wide ? ScalarType::Double : ScalarType::Float);
  const void* values = source.const_data_ptr();
  const bool* used = mask.const_data_ptr<bool>();
  const float* weight = weights.const_data_ptr<float>();
  void* sums = out.mutable_data_ptr();
  std::atomic<int64_t> bad{INT64_MAX};  // the first place that is not a log-probability or weight
  torch::stable::parallel_for(
      0, rows, grain_rows(width * 9), [&](int64_t begin, int64_t end) noexcept {
        for (int64_t row = begin; row < end; ++row) {
          double sum = 0;
          for (int64_t i = row * width; i < (row + 1) * width; ++i) {
            if (!used[i]) continue;
            const double logp = load(values, dtype, i);
            const bool good = logp <= kTolerance && weight[i] >= 0 && std::isfinite(weight[i]);
            if (!good) {
              int64_t first = bad.load();
              while (i < first && !bad.compare_exchange_weak(first, i)) {
              }
            } else if (weight[i] != 0) {
              sum += static_cast<double>(weight[i]) * carried(logp, carrier);
            }
          }
          if (wide) {
            static_cast<double*>(sums)[row] = sum;
          } else {
            static_cast<float*>(sums)[row] = static_cast<float>(sum);
          }
        }
      });
  if (const int64_t i = bad.load(); i != INT64_MAX) {
    const double logp = load(values, dtype, i);
    ALIGNOPS_CHECK(logp <= kTolerance, op, ": logps must be at most 0 where mask is set, got ",
                   logp, " in row ", i / width, " at ", i % width);
    ALIGNOPS_CHECK(false, op, ": weights must be finite and not negative where mask is set, got ",
                   weight[i], " in row ", i / width, " at ", i % width);
  }
  return out;
}

}  // namespace
}  // namespace alignops::spans

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def("spans_cbd_penalty(Tensor logps, Tensor mask, Tensor weights, int carrier) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("spans_cbd_penalty", TORCH_BOX(&alignops::spans::cbd_penalty));
}
