// One way to launch CUDA kernels, for all cores. A launcher takes raw pointers to device memory and
// sizes, returns CUDA's error and says in `Launch` which kernel it belongs to.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace alignops::cuda {

struct Launch {
  cudaStream_t stream;
  const char* kernel = "";  // set by the launcher: what was launched last, and its grid
  int64_t grid = 0;
};

#ifdef __CUDACC__

template <class... Parameters, class... Arguments>
cudaError_t run(Launch& launch, const char* name, void (*kernel)(Parameters...), int64_t grid,
                int threads, const Arguments&... arguments) {
  launch.kernel = name;
  launch.grid = grid;
  if (grid == 0) return cudaSuccess;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(grid), threads, 0, launch.stream>>>(arguments...);
  return cudaGetLastError();
}

#endif

}  // namespace alignops::cuda
