// All tasks of a call of the attention operator, and their reduction, on the threads of the caller.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "attention/partition.h"
#include "common/parallel.h"

namespace alignops::attention {

// A call with its buffer. Tasks are handed out as threads ask for them; who computes which one does
// not show in the result.
class Call {
 public:
  Call(const Kernels& table, const Attend& attend, const Partition& part,
       const ScratchLayout& layout, char* buffer, int64_t lanes)
      : table_(table),
        attend_(attend),
        part_(part),
        layout_(layout),
        base_(reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer) + 63) / 64 * 64)),
        lanes_(lanes) {}

  void run(const ParallelFor& parallel) {
    std::atomic<int64_t> next{0};
    parallel(0, lanes_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t lane = begin; lane < end; ++lane)
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < part_.tasks;)
          task(i, lane);
    });
    if (part_.chunks == 1) return;
    const int64_t parts = (layout_.queries + kQueriesPerPart - 1) / kQueriesPerPart;
    const int64_t count = part_.tasks / part_.chunks * parts;
    next.store(0);
    parallel(0, lanes_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t lane = begin; lane < end; ++lane)
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
          reduce(i / parts, i % parts * kQueriesPerPart, lane);
    });
  }

 private:
  static constexpr int64_t kQueriesPerPart = 4;

  float* lane(int64_t i) const { return base_ + layout_.lanes + i * layout_.lane; }
  Piece* pieces() const {
    return attend_.mass == nullptr ? nullptr : reinterpret_cast<Piece*>(base_);
  }
  // Of task i.
  State state(int64_t i, int64_t lane_number) const {
    return layout_.state_at(part_.chunks > 1 ? base_ + layout_.states + i * layout_.state
                                             : lane(lane_number) + layout_.workspace.total);
  }
  int64_t row_begin(int64_t block) const { return block * part_.rows_per_block; }
  int64_t row_end(int64_t block) const {
    return std::min(row_begin(block) + part_.rows_per_block, attend_.plan.header.rows);
  }

  void task(int64_t i, int64_t lane_number) const {
    const int64_t block = i / part_.chunks % part_.row_blocks, chunk = i % part_.chunks;
    const int64_t token = chunk * part_.tokens_per_chunk;
    table_.attend(attend_,
                  {i / (part_.row_blocks * part_.chunks), row_begin(block), row_end(block), chunk,
                   token, std::min(token + part_.tokens_per_chunk, attend_.plan.header.tokens),
                   state(i, lane_number), pieces(), layout_.piece_row, lane(lane_number)});
    if (part_.chunks == 1)
      for (int64_t first = 0; first < layout_.queries; first += kQueriesPerPart)
        reduce(i, first, lane_number);
  }

  // Some queries, from `first` on, of all chunks of the i-th head and block of rows.
  void reduce(int64_t i, int64_t first, int64_t lane_number) const {
    const int64_t block = i % part_.row_blocks;
    const int64_t queries = (row_end(block) - row_begin(block)) * attend_.group;
    table_.reduce(attend_,
                  {state(i * part_.chunks, lane_number), layout_.state * 4, part_.chunks,
                   part_.tokens_per_chunk, i / part_.row_blocks, row_begin(block), row_end(block),
                   pieces(), layout_.piece_row, lane(lane_number) + layout_.workspace.v},
                  first, std::min(first + kQueriesPerPart, queries));
  }

  const Kernels& table_;
  const Attend& attend_;
  const Partition& part_;
  const ScratchLayout& layout_;
  float* base_;
  int64_t lanes_;
};

}  // namespace alignops::attention
