// The self-test of kernel tables: it accepts every table of this machine, and notices one wrong
// value in the results of each function.
#include "ternary/self_test.h"

#include "common/isa.h"
#include "harness.h"

namespace alignops::ternary {
namespace {

using test::expect;

template <class Table>
Table changed(Table table, const auto& change) {
  change(table);
  return table;
}

void add_one(const LinearArgs& a) { static_cast<float*>(a.y)[a.m * a.n - 1] += 1.0f; }

const test::Register accepts("self-test accepts this machine's tables", [] {
  expect(agrees_with_scalar(kQuantizeScalar), "scalar quantization");
  expect(agrees_with_scalar(kLinearScalar), "scalar linear");
  expect(agrees_with_scalar(kInt8Scalar), "scalar int8");
  expect(self_test_failure() == nullptr, "a level was replaced");
});

const test::Register quantization("self-test notices wrong quantization", [] {
  const auto rejects = [](const auto& change, const char* what) {
    expect(!agrees_with_scalar(changed(kQuantizeScalar, change)), what);
  };
  rejects(
      [](QuantizeKernels& t) {
        t.quantize = [](const QuantizeArgs& a, QuantizeOut& out, int64_t begin, int64_t end) {
          kQuantizeScalar.quantize(a, out, begin, end);
          out.idx[0] ^= 1;
        };
      },
      "idx");
  rejects(
      [](QuantizeKernels& t) {
        t.quantize = [](const QuantizeArgs& a, QuantizeOut& out, int64_t begin, int64_t end) {
          kQuantizeScalar.quantize(a, out, begin, end);
          out.scale[a.n - 1] += 1.0f;
        };
      },
      "scale");
  rejects(
      [](QuantizeKernels& t) {
        t.fake_quant = [](const FakeQuantArgs& a, int64_t begin, int64_t end) {
          kQuantizeScalar.fake_quant(a, begin, end);
          static_cast<float*>(a.out)[7] += 1.0f;
        };
      },
      "fake_quant");
  rejects(
      [](QuantizeKernels& t) {
        t.dequantize = [](const DequantizeArgs& a, int64_t begin, int64_t end) {
          kQuantizeScalar.dequantize(a, begin, end);
          static_cast<float*>(a.out)[7] += 1.0f;
        };
      },
      "dequantize");
});

const test::Register linear("self-test notices wrong products", [] {
  const auto rejects = [](const auto& change, const char* what) {
    expect(!agrees_with_scalar(changed(kLinearScalar, change)), what);
  };
  rejects(
      [](LinearKernels& t) {
        t.pack = [](const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
                    int64_t begin, int64_t end) {
          kLinearScalar.pack(idx, sign, n, k, packed, begin, end);
          packed[3] ^= 8;
        };
      },
      "pack");
  rejects(
      [](LinearKernels& t) {
        t.stage = [](const StageArgs& a, int64_t begin, int64_t end) {
          kLinearScalar.stage(a, begin, end);
          if (a.act == Act::kA16) a.q[5] = static_cast<int8_t>(a.q[5] ^ 1);
        };
      },
      "stage");
  rejects(
      [](LinearKernels& t) {
        t.tables = [](const int8_t* q, int64_t blocks, uint8_t* out) {
          kLinearScalar.tables(q, blocks, out);
          for (int64_t i = 0; i < 32; ++i) out[2 * i] ^= 1;
        };
      },
      "tables");
  rejects(
      [](LinearKernels& t) {
        t.lookup = [](const LinearArgs& a, int64_t, int64_t) { add_one(a); };
      },
      "lookup");
  rejects(
      [](LinearKernels& t) {
        t.lookup_f32 = [](const LinearArgs& a, int64_t begin, int64_t end) {
          kLinearScalar.lookup_f32(a, begin, end);
          add_one(a);
        };
      },
      "lookup_f32");
#if defined(__x86_64__)
  if (!isa_supported(Isa::kAvx512)) return;
  LinearKernels dot = kLinearAvx512;
  dot.dot = [](const LinearArgs& a, int64_t begin, int64_t end) {
    kLinearAvx512.dot(a, begin, end);
    add_one(a);
  };
  expect(!agrees_with_scalar(dot), "dot");
#endif
});

const test::Register int8("self-test notices a wrong int8 head", [] {
  Int8Kernels table = kInt8Scalar;
  table.quantize = [](Int8QuantizeArgs& a, int64_t begin, int64_t end) {
    kInt8Scalar.quantize(a, begin, end);
    ++a.q[a.n * a.k - 1];
  };
  expect(!agrees_with_scalar(table), "quantize");
  table = kInt8Scalar;
  table.linear = [](const Int8LinearArgs& a, int64_t begin, int64_t end) {
    kInt8Scalar.linear(a, begin, end);
    static_cast<float*>(a.y)[a.m * a.n - 1] += 1.0f;
  };
  expect(!agrees_with_scalar(table), "linear");
});

}  // namespace
}  // namespace alignops::ternary
