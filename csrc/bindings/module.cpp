// alignops._C: controls of the native library. Loading it registers the operators of every core
// with torch.
#include <pybind11/pybind11.h>

#include "attention/bind.h"
#include "attention/kernels.h"
#include "common/isa.h"
#include "spans/bind.h"
#include "spans/kernels.h"
#include "speculative/kernels.h"
#include "ternary/kernels.h"
#include "tree/bind.h"
#include "tree/kernels.h"

namespace py = pybind11;

namespace {

py::tuple available_isas() {
  py::list names;
  for (int level = 0; level < alignops::kNumIsas; ++level) {
    const auto isa = static_cast<alignops::Isa>(level);
    if (alignops::isa_supported(isa)) names.append(alignops::isa_name(isa));
  }
  return py::tuple(names);
}

const char* self_test_failure() {
  for (const char* failure :
       {alignops::ternary::self_test_failure(), alignops::spans::self_test_failure(),
        alignops::speculative::self_test_failure(), alignops::attention::self_test_failure(),
        alignops::tree::self_test_failure()})
    if (failure != nullptr) return failure;
  return nullptr;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = ALIGNOPS_COMPILER;
  info["build_type"] = ALIGNOPS_BUILD_TYPE;
  info["torch"] = ALIGNOPS_BUILD_TORCH;
  info["torch_target"] = ALIGNOPS_TORCH_FLOOR;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native library of alignops.";
  m.def(
      "active_isa", [] { return alignops::isa_name(alignops::active_isa()); },
      "Instruction set in use.");
  m.def("available_isas", &available_isas, "Instruction sets of this machine, slowest first.");
  m.def(
      "set_isa", [](const std::string& name) { alignops::set_isa(name.c_str()); }, py::arg("name"),
      "Choose the instruction set of all following calls; ValueError lists the choices.");
  m.def(
      "cpu_layout", [] { return static_cast<int>(alignops::ternary::kernels().linear->layout); },
      "Layout of packed ternary weights that the active instruction set reads.");
  m.def("self_test_failure", &self_test_failure,
        "Name of a kernel family that disagreed with the scalar code and was replaced by a slower "
        "one, or None.");
  m.def("build_info", &build_info, "Compiler, build type and torch version of the build.");
  alignops::attention::bind_attention_workspace(m);
  alignops::spans::bind_spans_store(m);
  alignops::spans::bind_spans_index(m);
  alignops::spans::bind_spans_matcher(m);
  alignops::tree::bind_tree(m);
}
