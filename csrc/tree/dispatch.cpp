#include "common/level_tables.h"
#include "tree/kernels.h"
#include "tree/self_test.h"

namespace alignops::tree {
namespace {

LevelTables<Kernels> make_tables() noexcept {
  LevelTables<Kernels> tables(kEdgesScalar, agrees_with_scalar, "tree edges");
#if defined(__x86_64__)
  // Most nodes have few edges: 16 lanes would be half empty.
  tables.add(Isa::kAvx2, kEdgesAvx2);
  tables.add(Isa::kAvx512, kEdgesAvx2);
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

}  // namespace alignops::tree
