#include "common/level_tables.h"
#include "spans/kernels.h"
#include "spans/self_test.h"

namespace alignops::spans {
namespace {

LevelTables<Kernels> make_tables() noexcept {
  LevelTables<Kernels> tables(kSearchScalar, agrees_with_scalar, "spans search");
#if defined(__x86_64__)
  tables.add(Isa::kAvx2, kSearchAvx2);
  tables.add(Isa::kAvx512, kSearchAvx512);
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

}  // namespace alignops::spans
