// Row primitives for AVX2.
#include "speculative/cpu/avx2_lanes.h"
#include "speculative/cpu/vector_rows.h"

namespace alignops::speculative {

const Kernels kRowsAvx2 = row_kernels<Avx2Lanes>();

}  // namespace alignops::speculative
