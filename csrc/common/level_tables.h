// The kernel table of every instruction set level of one core.
#pragma once

#include "common/isa.h"

namespace alignops {

// A table that disagrees with the scalar one, or that this CPU lacks, gives way to the level below,
// as does a level without a table of its own.
template <class Kernels>
class LevelTables {
 public:
  using Agrees = bool (*)(const Kernels& candidate);

  LevelTables(const Kernels& scalar, Agrees agrees, const char* name)
      : agrees_(agrees), name_(name) {
    for (const Kernels*& level : levels_) level = &scalar;
  }

  // Levels are added in rising order.
  void add(Isa isa, const Kernels& candidate) {
    if (!isa_supported(isa)) return;
    if (!agrees_(candidate)) {
      failure_ = name_;
      return;
    }
    for (int level = static_cast<int>(isa); level < kNumIsas; ++level) levels_[level] = &candidate;
  }

  const Kernels& active() const { return *levels_[static_cast<int>(active_isa())]; }

  // The name, if a table of this CPU disagreed, else null.
  const char* failure() const { return failure_; }

 private:
  const Kernels* levels_[kNumIsas];
  Agrees agrees_;
  const char* name_;
  const char* failure_ = nullptr;
};

}  // namespace alignops
