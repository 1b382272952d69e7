// Attention kernels on all levels, plans that are damaged, and the self-test.
#include <stdexcept>

#include "attention/self_test.h"
#include "attention_samples.h"
#include "common/isa.h"

namespace alignops::attention {
namespace {

using test::expect;
using test::Random;

constexpr int64_t kPageSize = 16;

// f(table) for the tables of this machine.
template <class F>
void each_level(const F& f) {
  const Isa before = active_isa();
  for (int level = 0; level < kNumIsas; ++level) {
    const auto isa = static_cast<Isa>(level);
    if (!isa_supported(isa)) continue;
    set_isa(isa_name(isa));
    f(kernels());
  }
  set_isa(isa_name(before));
}

const test::Register accepts("self-test accepts this machine's tables", [] {
  each_level([](const Kernels& table) { expect(agrees_with_scalar(table), "a level"); });
  expect(self_test_failure() == nullptr, "a level was replaced");
});

const test::Register notices("self-test notices wrong results", [] {
  const auto rejects = [](const auto& change, const char* what) {
    Kernels table = kAttentionScalar;
    change(table);
    expect(!agrees_with_scalar(table), what);
  };
  rejects(
      [](Kernels& t) {
        t.attend = [](const Attend& a, const Task& task) {
          kAttentionScalar.attend(a, task);
          task.state.l[0] *= 1.001f;
        };
      },
      "attend");
  rejects(
      [](Kernels& t) {
        t.reduce = [](const Attend& a, const Reduce& r, int64_t begin, int64_t end) {
          kAttentionScalar.reduce(a, r, begin, end);
          a.lse[0] += 0.01f;
        };
      },
      "reduce");
  rejects(
      [](Kernels& t) {
        t.append = [](const Append& a, int64_t begin, int64_t end) {
          kAttentionScalar.append(a, begin + 1, end);
        };
      },
      "append");
  rejects(
      [](Kernels& t) {
        t.rewrite = [](const Rewrite& w, int64_t begin, int64_t end) {
          kAttentionScalar.rewrite(w, begin, end - 1);
        };
      },
      "rewrite");
});

const test::Register threads("results do not depend on lanes and threads", [] {
  Random random(3);
  for (int round = 0; round < 12; ++round) {
    const PlanSample sample = random_plan(random, kPageSize, CallSample::kPairs);
    const PlanView plan = view_plan(sample.words.data(), static_cast<int64_t>(sample.words.size()),
                                    sample.pool_pages, "test");
    const DType dtype = random.pick<DType>({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
    CallSample call(random, sample.pool_pages, kPageSize, sample.rows, sample.blocks, dtype);
    each_level([&](const Kernels& table) {
      const auto one = call.run(table, plan, 1, serial_for());
      const auto four = call.run(table, plan, 4, threads_for(3));
      expect(one == four, "lanes");
      expect(one.intact && four.intact, "guards");
    });
  }
});

// Words of a plan are replaced by numbers near to what they were, or far from it. Either the plan
// is refused, or the call stays inside its memory, which the sanitizers watch.
const test::Register damage("damaged plans are refused or harmless", [] {
  Random random(11);
  int64_t refused = 0, harmless = 0;
  for (int round = 0; round < 40; ++round) {
    const PlanSample sample = random_plan(random, kPageSize, CallSample::kPairs);
    CallSample call(random, sample.pool_pages, kPageSize, sample.rows, sample.blocks,
                    DType::kFloat32);
    for (int hit = 0; hit < 60; ++hit) {
      std::vector<int64_t> words = sample.words;
      const auto size = static_cast<int64_t>(words.size());
      for (int64_t i = random.below(3); i >= 0; --i) {
        const int64_t place = random.below(3) == 0 ? random.below(size) : random.below(24);
        int64_t& word = words[static_cast<size_t>(place)];
        switch (random.below(4)) {
          case 0:
            word = random.below(100) - 50;
            break;
          case 1:
            word = static_cast<int64_t>(static_cast<uint64_t>(word) +
                                        static_cast<uint64_t>(random.below(5) - 2));
            break;
          case 2:
            word ^= int64_t{1} << random.below(63);
            break;
          default:
            word = random.pick<int64_t>({INT64_MAX, INT64_MIN, kMaxNumber, -kMaxNumber, size});
        }
      }
      try {
        const PlanView plan = view_plan(words.data(), size, sample.pool_pages, "test");
        // The operator compares these with its tensors.
        if (plan.header.rows != sample.rows || plan.header.blocks != sample.blocks ||
            plan.header.page_size != kPageSize || plan.header.types > 1 ||
            (plan.header.types == 1 && 1 + 2 * plan.ropes[0].pairs > CallSample::kKeys))
          continue;
        expect(call.run(kernels(), plan, 2, serial_for()).intact, "guards");
        ++harmless;
      } catch (const std::invalid_argument&) {
        ++refused;
      }
    }
  }
  expect(refused > 500 && harmless > 100, "both happen");
});

const test::Register truncated("a plan that is cut off is refused", [] {
  Random random(5);
  const PlanSample sample = random_plan(random, kPageSize, CallSample::kPairs);
  for (size_t size = 0; size < sample.words.size(); ++size) {
    const std::vector<int64_t> words(sample.words.begin(),
                                     sample.words.begin() + static_cast<std::ptrdiff_t>(size));
    bool refused = false;
    try {
      view_plan(words.data(), static_cast<int64_t>(size), sample.pool_pages, "test");
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    expect(refused, "cut off");
  }
});

}  // namespace
}  // namespace alignops::attention
