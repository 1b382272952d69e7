// Row primitives of the active table: the self-test accepts this machine's tables and notices one
// wrong value in the results of each function.
#include "harness.h"
#include "speculative/self_test.h"

namespace alignops::speculative {
namespace {

using test::expect;

const test::Register accepts("self-test accepts this machine's tables", [] {
  expect(agrees_with_scalar(kRowsScalar), "scalar");
  expect(agrees_with_scalar(kernels()), "active");
  expect(self_test_failure() == nullptr, "a level was replaced");
});

const test::Register notices("self-test notices wrong results", [] {
  const auto rejects = [](const auto& change, const char* what) {
    Kernels table = kRowsScalar;
    change(table);
    expect(!agrees_with_scalar(table), what);
  };
  rejects(
      [](Kernels& t) {
        t.largest = [](const Law& law, TileStats* out, int64_t begin, int64_t end) {
          kRowsScalar.largest(law, out, begin, end);
          ++out[begin].place;
        };
      },
      "largest");
  rejects(
      [](Kernels& t) {
        t.scan = [](const Law& law, TileStats* out, int64_t begin, int64_t end) {
          kRowsScalar.scan(law, out, begin, end);
          ++out[end - 1].sum;
        };
      },
      "scan");
  rejects(
      [](Kernels& t) {
        t.scan = [](const Law& law, TileStats* out, int64_t begin, int64_t end) {
          kRowsScalar.scan(law, out, begin, end);
          out[begin].bad = 0;
        };
      },
      "scan: bad");
  rejects(
      [](Kernels& t) {
        t.peak = [](const Law& law, uint64_t* out, int64_t begin, int64_t end) {
          kRowsScalar.peak(law, out, begin, end);
          ++out[end - 1];
        };
      },
      "peak");
  rejects(
      [](Kernels& t) {
        t.count = [](const Law& law, uint32_t* out, int64_t begin, int64_t end) {
          kRowsScalar.count(law, out, begin, end);
          ++out[end - 1];
        };
      },
      "count");
  rejects(
      [](Kernels& t) {
        t.sums = [](const Density& d, uint64_t* out, int64_t begin, int64_t end) {
          kRowsScalar.sums(d, out, begin, end);
          if (d.q != nullptr) ++out[end - 1];
        };
      },
      "sums");
  rejects(
      [](Kernels& t) {
        t.find = [](const Density& d, int64_t tile, uint64_t bound) {
          return kRowsScalar.find(d, tile, bound) + (tile == 2);
        };
      },
      "find");
  rejects(
      [](Kernels& t) {
        t.normalize = [](const Density& d, double total, float* out, int64_t begin, int64_t end) {
          kRowsScalar.normalize(d, total, out, begin, end);
          out[end * kTile > d.p->size ? d.p->size - 1 : end * kTile - 1] = 0.5f;
        };
      },
      "normalize");
  rejects(
      [](Kernels& t) {
        t.race = [](const Law& law, uint64_t seed, uint32_t position, TileRace* out, int64_t begin,
                    int64_t end) { kRowsScalar.race(law, seed, position + 1, out, begin, end); };
      },
      "race");
  rejects(
      [](Kernels& t) {
        t.entropy = [](const Law& law, double* out, int64_t begin, int64_t end) {
          kRowsScalar.entropy(law, out, begin, end);
          out[begin] += 1e-3;
        };
      },
      "entropy");
  rejects(
      [](Kernels& t) {
        t.histogram = [](const HistogramArgs& args, int64_t begin, int64_t end) {
          kRowsScalar.histogram(args, begin, end);
          ++args.sums[0];
        };
      },
      "histogram");
  rejects(
      [](Kernels& t) {
        t.collect = [](const Law& law, uint64_t low, uint64_t high, Entry* out, int64_t capacity,
                       int64_t begin, int64_t end) {
          const int64_t found = kRowsScalar.collect(law, low, high, out, capacity, begin, end);
          return found > 5 ? found - 1 : found;
        };
      },
      "collect");
});

}  // namespace
}  // namespace alignops::speculative
