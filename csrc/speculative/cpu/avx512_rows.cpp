// Row primitives for AVX-512.
#include "speculative/cpu/avx512_lanes.h"
#include "speculative/cpu/vector_rows.h"

namespace alignops::speculative {

const Kernels kRowsAvx512 = row_kernels<Avx512Lanes>();

}  // namespace alignops::speculative
