// The binding of the attention core; csrc/bindings/module.cpp calls it.
#pragma once

#include <pybind11/pybind11.h>

namespace alignops::attention {

void bind_attention_workspace(pybind11::module_& m);

}  // namespace alignops::attention
