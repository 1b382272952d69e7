// What goes wrong with shared caches, as C++ types. The binding turns each into the Python class of
// the same name in alignops.attention.errors.
#pragma once

#include <stdexcept>

namespace alignops::attention::store {

// A view breaks a rule. ValueError.
struct LayoutError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Somebody else writes the block. RuntimeError.
struct BlockBusy : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a plan describes has changed since. RuntimeError.
struct StalePlan : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Too few pages are free; nothing was reserved. RuntimeError.
struct PoolExhausted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace alignops::attention::store
