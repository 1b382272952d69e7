// Launchers of the CUDA kernels: raw pointers to device memory, sizes, a stream. No torch, no
// allocation, no synchronization; every call may be captured as a graph.
//
// Plans and lengths lie on the device and are not read back, so nothing checks them. A row whose
// plan does not fit is left out, as is a node of a path or a page that is not there; a bad length
// gives a wrong mask. Nothing outside the tensors is read or written.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "../../common/cuda_launch.h"
#include "../layout.h"
#include "../moves.h"

namespace alignops::speculative::cuda {

using alignops::cuda::Launch;

// Slots [src, src + length) of row b go to [dst, dst + length) of the same row, in place. With
// rows, those that do not name themselves stay.
struct Shift {
  Ints src, dst, length, rows;
};
cudaError_t shift(const std::vector<CacheTensor>& caches, const Shift& plan, Launch& launch);

cudaError_t gather(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
                   const GatherPlan& plan, Launch& launch);

// counts[b] slots of row b of `from` go to slots lens[b] .. of `to`; without counts, all.
struct Append {
  Ints lens, counts;
};
cudaError_t append(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
                   const Append& plan, Launch& launch);

cudaError_t tree(const std::vector<CacheTensor>& caches, const TreePlan& plan, Launch& launch);

// A row has less than 2^31 slots in its pages.
cudaError_t paged_tree(const std::vector<CacheTensor>& caches, const TreePlan& plan,
                       const Pages& pages, Launch& launch);

// Slots [cu[b], cu[b + 1]) of the only row go to new_cu[b], as many as have room before
// new_cu[b + 1]. In place no row may move to the right.
struct Packed {
  Ints cu, new_cu;
  int64_t rows;
  bool in_place;
};
cudaError_t packed(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
                   const Packed& plan, Launch& launch);

// The functions of moves.h and layout.h of the same names, without their checks.
cudaError_t plan_realign(const Realign& args, Launch& launch);
cudaError_t query_positions(const Queries& queries, int64_t* out, Launch& launch);
cudaError_t column_positions(const Ints& content, const Ints& pad, int64_t rows, int64_t columns,
                             int64_t* out, Launch& launch);
cudaError_t fill_mask(const MaskArgs& args, Launch& launch);  // any kind
cudaError_t offsets(const Queries& queries, int32_t* query_offsets, int32_t* slot_offsets,
                    Launch& launch);

// Nodes whose parent does not come before them are like those behind the tree.
cudaError_t fill_tree(const TreeTables& tables, Launch& launch);

// NaN is the lowest score; a node whose parent is not chosen becomes a child of the root.
cudaError_t select_tree(const TreeSelection& selection, Launch& launch);

}  // namespace alignops::speculative::cuda
