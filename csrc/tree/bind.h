// The binding of the tree core; csrc/bindings/module.cpp calls it.
#pragma once

#include <pybind11/pybind11.h>

namespace alignops::tree {

void bind_tree(pybind11::module_& m);

}  // namespace alignops::tree
