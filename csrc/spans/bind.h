// The parts of the binding of the spans core; csrc/bindings/module.cpp calls them in this order.
#pragma once

#include <pybind11/pybind11.h>

namespace alignops::spans {

void bind_spans_store(pybind11::module_& m);
void bind_spans_index(pybind11::module_& m);
void bind_spans_matcher(pybind11::module_& m);

}  // namespace alignops::spans
