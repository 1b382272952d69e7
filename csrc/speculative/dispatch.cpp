#include "common/level_tables.h"
#include "speculative/kernels.h"
#include "speculative/self_test.h"

namespace alignops::speculative {
namespace {

LevelTables<Kernels> make_tables() noexcept {
  LevelTables<Kernels> tables(kRowsScalar, agrees_with_scalar, "speculative rows");
#if defined(__x86_64__)
  tables.add(Isa::kAvx2, kRowsAvx2);
  tables.add(Isa::kAvx512, kRowsAvx512);
#endif
  return tables;
}

const LevelTables<Kernels>& tables() noexcept {
  static const LevelTables<Kernels> instance = make_tables();
  return instance;
}

}  // namespace

const Kernels& kernels() { return tables().active(); }

const char* self_test_failure() { return tables().failure(); }

}  // namespace alignops::speculative
