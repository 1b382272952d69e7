#include "attention/kernels.h"
#include "attention/self_test.h"
#include "common/level_tables.h"

namespace alignops::attention {
namespace {

LevelTables<Kernels> make_tables() noexcept {
  LevelTables<Kernels> tables(kAttentionScalar, agrees_with_scalar, "attention");
#if defined(__x86_64__)
  tables.add(Isa::kAvx2, kAttentionAvx2);
  tables.add(Isa::kAvx512, kAttentionAvx512);
  tables.add(Isa::kAvx512Bf16, kAttentionAvx512Bf16);
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

}  // namespace alignops::attention
