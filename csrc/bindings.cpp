// The only file that knows Python: integers and floats in, GIL released, status -> exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

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

void check(int status) {
  if (status == GKT_INVALID) throw py::value_error(gkt_last_error());
  if (status != GKT_OK) throw std::runtime_error(gkt_last_error());
}

template <class Body>
int without_gil(const Body& body) {
  py::gil_scoped_release release;
  return body();
}

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, batch stride, channel stride, position stride)
using Activation = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

gkt_activation activation(const Activation& a) {
  return {pointer(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a)};
}

// (dtype, channels_last, ghosts, rows of a ghost batch, channels, positions)
using Shape = std::tuple<int32_t, bool, int64_t, int64_t, int64_t, int64_t>;

gkt_ghost_batch_norm_params ghost_batch_norm_params(const Shape& shape, double eps, bool relu,
                                                    bool use_running) {
  gkt_ghost_batch_norm_params params = {};
  int32_t channels_last = 0;
  std::tie(params.dtype, channels_last, params.ghosts, params.ghost_rows, params.channels,
           params.positions) = shape;
  params.channels_last = channels_last;
  params.eps = eps;
  params.relu = relu;
  params.use_running = use_running;
  return params;
}

template <int (*run)(const gkt_ghost_batch_norm_params*, int)>
void ghost_batch_norm_fwd(const Shape& shape, double eps, bool relu, bool use_running,
                          const Activation& x, const Activation& residual, uintptr_t weight,
                          uintptr_t bias, uintptr_t keep, const Activation& y, uintptr_t statistics,
                          uintptr_t mask, int threads) {
  gkt_ghost_batch_norm_params params = ghost_batch_norm_params(shape, eps, relu, use_running);
  params.x = activation(x);
  params.residual = activation(residual);
  params.weight = pointer(weight);
  params.bias = pointer(bias);
  params.keep = pointer<const uint8_t>(keep);
  params.y = activation(y);
  params.statistics = pointer(statistics);
  params.mask = pointer<uint8_t>(mask);
  check(without_gil([&] { return run(&params, threads); }));
}

template <int (*run)(const gkt_ghost_batch_norm_params*, int)>
void ghost_batch_norm_bwd(const Shape& shape, double eps, bool relu, bool use_running,
                          const Activation& grad_y, const Activation& x, uintptr_t weight,
                          uintptr_t statistics, uintptr_t mask, uintptr_t keep,
                          const Activation& grad_x, const Activation& grad_residual,
                          uintptr_t grad_weight, uintptr_t grad_bias, int threads) {
  gkt_ghost_batch_norm_params params = ghost_batch_norm_params(shape, eps, relu, use_running);
  params.grad_y = activation(grad_y);
  params.x = activation(x);
  params.weight = pointer(weight);
  params.statistics = pointer(statistics);
  params.mask = pointer<uint8_t>(mask);
  params.keep = pointer<const uint8_t>(keep);
  params.grad_x = activation(grad_x);
  params.grad_residual = activation(grad_residual);
  params.grad_weight = pointer(grad_weight);
  params.grad_bias = pointer(grad_bias);
  check(without_gil([&] { return run(&params, threads); }));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "gkt_fast's native kernels. Call them through gkt_fast.ops.";
  module.attr("abi_version") = GKT_ABI_VERSION;
  module.def("build_info", &build_info);
  module.def("ghost_batch_norm_fwd_cpu", &ghost_batch_norm_fwd<gkt_ghost_batch_norm_fwd_cpu>);
  module.def("ghost_batch_norm_bwd_cpu", &ghost_batch_norm_bwd<gkt_ghost_batch_norm_bwd_cpu>);
}
