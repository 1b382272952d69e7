// torch's threads as a ParallelFor: they follow torch.set_num_threads. A forked process has one.
#pragma once

#include "parallel.h"

namespace alignops {

ParallelFor torch_parallel_for();

}  // namespace alignops
