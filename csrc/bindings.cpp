// The only file that knows Python: integers and floats in, GIL released, status -> exception.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "gkt_abi.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["abi"] = GKT_ABI_VERSION;
  info["compiler"] = GKT_BUILD_COMPILER;
  info["openmp"] = GKT_BUILD_OPENMP;
  info["instruction_sets"] = GKT_BUILD_ISAS;
  info["active_instruction_set"] = gkt::isa_name(gkt::active_isa());
  info["cuda"] = GKT_BUILD_CUDA;
  info["cuda_architectures"] = GKT_BUILD_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "gkt_fast's native kernels. Call them through gkt_fast.ops.";
  module.attr("abi_version") = GKT_ABI_VERSION;
  module.def("build_info", &build_info);
}
