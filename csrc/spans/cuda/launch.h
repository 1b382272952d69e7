// Launchers of the CUDA kernels: raw pointers to device memory, sizes, a stream. No torch, no
// allocation, no synchronization; every call may be captured as a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../common/cuda_launch.h"
#include "../kernels.h"

namespace alignops::spans::cuda {

using alignops::cuda::Launch;

// Rows of token ids, and the index that they are looked up in (without ids, directory and guards).
// Ids outside the vocabulary occur nowhere; offsets, ranks and positions outside their arrays are
// clamped.
struct RowArgs {
  Shard index;
  const int64_t* tokens;
  int64_t total;           // tokens of all rows
  const int64_t* offsets;  // (rows + 1)
  int64_t rows;
};

// (rows, 2): the suffixes that start with each row.
cudaError_t find(const RowArgs& args, int64_t* intervals, Launch& launch);

// (rows, width): occurrences of each row followed by each of its candidates.
cudaError_t next_counts(const RowArgs& args, const int64_t* candidates, int64_t width,
                        int64_t* counts, Launch& launch);

// (rows, width): the longest suffix that occurs of each row followed by each of its candidates.
struct PeekArgs {
  const int64_t* candidates;
  int64_t width;
  const double* surprisal;  // (vocab)
  double tau;
  int64_t min_len, max_count;
  bool* flag;
  int64_t* length;
  int64_t* count;
  double* bci;
};
cudaError_t peek(const RowArgs& rows, const PeekArgs& args, Launch& launch);

}  // namespace alignops::spans::cuda
