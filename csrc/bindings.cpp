// What Python sees. Only the files bindings* know it: numbers, addresses and handles in, GIL
// released, status -> exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "bindings_common.h"
#include "bindings_residual_block.h"
#include "bindings_running_statistics.h"
#include "cpu/isa.h"
#include "gkt_abi.h"

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

int64_t item(const py::tuple& tuple, size_t index) { return tuple[index].cast<int64_t>(); }

// The address of a tensor's values; null for None. A tensor is whatever has data_ptr(), so that
// nothing here is built against torch.
template <class T = void>
T* values(py::handle tensor) {
  if (tensor.is_none()) return nullptr;
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  const auto address =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
  if (!address) throw py::error_already_set();
  T* const found = static_cast<T*>(PyLong_AsVoidPtr(address.ptr()));
  // A null address would read as an argument that isn't given.
  if (found == nullptr && tensor.attr("numel")().cast<int64_t>() != 0)
    throw py::value_error("a tensor has no memory to read or write");
  return found;
}

// (dtype, channels_last, ghosts, rows of each but the first, channels, positions, rows of the
// first)
using Shape = std::tuple<int32_t, bool, int64_t, int64_t, int64_t, int64_t, int64_t>;

// Of batch, channel and position, in elements.
using Strides = std::tuple<int64_t, int64_t, int64_t>;

// A problem of ghost_batch_norm that is described once: each call adds the tensors.
class GhostBatchNorm {
 public:
  GhostBatchNorm(const Shape& shape, double eps, bool relu, bool use_running, double momentum,
                 const Strides& x, const Strides& residual, const Strides& y, const Strides& grad_y,
                 const Strides& grad_x, const Strides& grad_residual)
      : problem_{} {
    int32_t channels_last = 0;
    std::tie(problem_.dtype, channels_last, problem_.ghosts, problem_.ghost_rows, problem_.channels,
             problem_.positions, problem_.lead_rows) = shape;
    problem_.channels_last = channels_last;
    problem_.eps = eps;
    problem_.relu = relu;
    problem_.use_running = use_running;
    problem_.momentum = momentum;
    problem_.x = activation(x);
    problem_.residual = activation(residual);
    problem_.y = activation(y);
    problem_.grad_y = activation(grad_y);
    problem_.grad_x = activation(grad_x);
    problem_.grad_residual = activation(grad_residual);
  }

  // Where: the number of threads, or the stream's handle.
  template <auto run, class Where>
  void forward(py::handle x, py::handle residual, py::handle weight, py::handle bias,
               py::handle keep, py::handle y, py::handle statistics, py::handle mask,
               py::handle running_mean, py::handle running_var, py::handle workspace,
               Where where) const {
    gkt_ghost_batch_norm_params params = problem_;
    params.x.data = values(x);
    params.residual.data = values(residual);
    params.weight = values(weight);
    params.bias = values(bias);
    params.keep = values<const uint8_t>(keep);
    params.y.data = values(y);
    params.statistics = values(statistics);
    params.mask = values<uint8_t>(mask);
    params.running_mean = values(running_mean);
    params.running_var = values(running_var);
    params.workspace = values(workspace);
    check(without_gil([&] { return run(&params, place(where)); }));
  }

  template <auto run, class Where>
  void backward(py::handle grad_y, py::handle x, py::handle weight, py::handle statistics,
                py::handle mask, py::handle keep, py::handle grad_x, py::handle grad_residual,
                py::handle grad_weight, py::handle grad_bias, py::handle workspace,
                Where where) const {
    gkt_ghost_batch_norm_params params = problem_;
    params.grad_y.data = values(grad_y);
    params.x.data = values(x);
    params.weight = values(weight);
    params.statistics = values(statistics);
    params.mask = values<uint8_t>(mask);
    params.keep = values<const uint8_t>(keep);
    params.grad_x.data = values(grad_x);
    params.grad_residual.data = values(grad_residual);
    params.grad_weight = values(grad_weight);
    params.grad_bias = values(grad_bias);
    params.workspace = values(workspace);
    check(without_gil([&] { return run(&params, place(where)); }));
  }

#ifdef GKT_WITH_CUDA
  int64_t workspace() const { return gkt_ghost_batch_norm_workspace_cuda(&problem_); }
#endif

 private:
  static gkt_activation activation(const Strides& strides) {
    return {nullptr, std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
  }

  gkt_ghost_batch_norm_params problem_;
};

// A tensor of logits as torch has it: addresses of it and of its gradient, shape, strides of both.
// (S, B, C, *spatial), or (B, C, *spatial) for the full network's alone.
using LogitsTensor = std::tuple<uintptr_t, uintptr_t, py::tuple, py::tuple, py::tuple>;

// Streams of the tensor from address on; `lead` dimensions come before the batch.
gkt_stream_logits stream_logits(const LogitsTensor& tensor, size_t lead) {
  const auto& [logits, gradient, shape, strides, gradient_strides] = tensor;
  gkt_stream_logits streams{};
  streams.logits = pointer<const void>(logits);
  streams.gradient = pointer<void>(gradient);
  streams.class_stride = item(strides, lead + 1);
  streams.gradient_class_stride = item(gradient_strides, lead + 1);
  if (lead == 1) {
    streams.stream_stride = item(strides, 0);
    streams.gradient_stream_stride = item(gradient_strides, 0);
  }
  return streams;
}

// Sizes and strides of the rows: the batch, which comes first, and the spatial dimensions.
// Neighbours that one stride can walk in every tensor are merged. Subnets have fewer rows of the
// batch, which changes no stride.
void set_rows(gkt_group_knowledge_loss_params& p, const LogitsTensor& full, size_t full_lead,
              const LogitsTensor& subnets, const py::tuple& targets) {
  const py::tuple& shape = std::get<2>(full);
  int64_t* const strides[] = {p.full.row_strides, p.full.gradient_row_strides,
                              p.subnets.row_strides, p.subnets.gradient_row_strides,
                              p.targets_row_strides};
  p.row_dims = 0;
  for (size_t d = 0; d + full_lead < shape.size(); ++d) {  // of (B, C, *spatial)
    const int64_t size = item(shape, d + full_lead);
    if (d == 1 || size == 1) continue;
    // Targets are (B, *spatial), or (B, C, *spatial) where they are probabilities.
    const size_t target_dim = d == 0 ? 0 : d - (p.probabilities ? 0 : 1);
    const int64_t steps[] = {item(std::get<3>(full), d + full_lead),
                             item(std::get<4>(full), d + full_lead),
                             item(std::get<3>(subnets), d + 1), item(std::get<4>(subnets), d + 1),
                             item(targets, target_dim)};
    const int last = p.row_dims - 1;
    bool mergeable = last >= 0;
    for (size_t i = 0; mergeable && i < 5; ++i) mergeable = strides[i][last] == size * steps[i];
    if (!mergeable && p.row_dims == GKT_MAX_ROW_DIMS)
      throw py::value_error("logits has too many dimensions");
    const int place = mergeable ? last : p.row_dims++;
    p.row_sizes[place] = mergeable ? p.row_sizes[place] * size : size;
    for (size_t i = 0; i < 5; ++i) strides[i][place] = steps[i];
  }
  if (p.row_dims == 0) {
    p.row_dims = 1;
    p.row_sizes[0] = 1;
  }
  p.subnet_rows = item(std::get<2>(subnets), 1);
  for (size_t d = 2 + full_lead; d < shape.size(); ++d) p.subnet_rows *= item(shape, d);
}

// Addresses with sizes and strides in elements; the options are in the order of the Python
// function.
gkt_group_knowledge_loss_params group_knowledge_loss_params(
    int dtype, const LogitsTensor& logits, const std::optional<LogitsTensor>& full_logits,
    uintptr_t targets, const py::tuple& targets_strides, bool probabilities, uintptr_t loss,
    uintptr_t terms, int64_t groups, double ema, double temperature, bool normalize_logits,
    double eps, double ce_weight, double kd_weight, double subnet_ce_weight, int64_t ignore_index,
    double label_smoothing, bool distill_ignored, double gradient_scale) {
  gkt_group_knowledge_loss_params p{};
  const bool apart = full_logits.has_value();
  const LogitsTensor& full = apart ? *full_logits : logits;
  p.full = stream_logits(full, apart ? 0 : 1);
  p.subnets = stream_logits(logits, 1);
  if (!apart) {  // the subnets follow the full network
    const int64_t value_bytes = dtype == GKT_FLOAT64 ? 8 : dtype == GKT_FLOAT32 ? 4 : 2;
    const auto next = [&](auto* address, int64_t stride) {
      return pointer<std::remove_pointer_t<decltype(address)>>(
          reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(stride * value_bytes));
    };
    p.subnets.logits = next(p.full.logits, p.full.stream_stride);
    if (p.full.gradient != nullptr)
      p.subnets.gradient = next(p.full.gradient, p.full.gradient_stream_stride);
  }
  p.targets = pointer<const void>(targets);
  p.loss = pointer<void>(loss);
  p.terms = pointer<void>(terms);
  p.dtype = dtype;
  p.probabilities = probabilities;
  p.streams = item(std::get<2>(logits), 0) + (apart ? 1 : 0);
  p.classes = item(std::get<2>(logits), 2);
  p.groups = groups;
  set_rows(p, full, apart ? 0 : 1, logits, targets_strides);
  p.targets_class_stride = probabilities ? item(targets_strides, 1) : 0;
  p.ema = ema;
  p.temperature = temperature;
  p.eps = eps;
  p.ce_weight = ce_weight;
  p.kd_weight = kd_weight;
  p.subnet_ce_weight = subnet_ce_weight;
  p.label_smoothing = label_smoothing;
  p.ignore_index = ignore_index;
  p.normalize_logits = normalize_logits;
  p.distill_ignored = distill_ignored;
  p.gradient_scale = gradient_scale;
  return p;
}

void group_knowledge_loss_cpu(const gkt_group_knowledge_loss_params& params, int threads) {
  check(without_gil([&] { return gkt_group_knowledge_loss_cpu(&params, threads); }));
}

#ifdef GKT_WITH_CUDA
void group_knowledge_loss_cuda(const gkt_group_knowledge_loss_params& params, uintptr_t workspace,
                               uintptr_t report, uintptr_t stream) {
  check(without_gil([&] {
    return gkt_group_knowledge_loss_cuda(&params, pointer(workspace), pointer<int64_t>(report),
                                         pointer(stream));
  }));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "gkt_fast's native kernels. Call them through gkt_fast.ops.";
  module.attr("abi_version") = GKT_ABI_VERSION;
  module.def("build_info", &build_info);
  py::class_<GhostBatchNorm>(module, "GhostBatchNorm", py::module_local())
      .def(py::init<const Shape&, double, bool, bool, double, const Strides&, const Strides&,
                    const Strides&, const Strides&, const Strides&, const Strides&>())
#ifdef GKT_WITH_CUDA
      .def("forward_cuda", &GhostBatchNorm::forward<gkt_ghost_batch_norm_fwd_cuda, uintptr_t>)
      .def("backward_cuda", &GhostBatchNorm::backward<gkt_ghost_batch_norm_bwd_cuda, uintptr_t>)
      .def("workspace_cuda", &GhostBatchNorm::workspace)
#endif
      .def("forward_cpu", &GhostBatchNorm::forward<gkt_ghost_batch_norm_fwd_cpu, int>)
      .def("backward_cpu", &GhostBatchNorm::backward<gkt_ghost_batch_norm_bwd_cpu, int>);
  module.def("load_torch", &gkt::load_torch);
  module.def("update_running_statistics", &update_running_statistics);
  py::class_<ResidualBlock>(module, "ResidualBlock", py::module_local())
      .def(py::init<const std::vector<int64_t>&, std::vector<double>, bool, int64_t,
                    std::optional<int64_t>, bool, std::optional<int32_t>>())
#ifdef GKT_WITH_CUDA
      .def("forward_cuda", &ResidualBlock::forward<gkt::CudaLaunch, uintptr_t>)
      .def("backward_cuda", &ResidualBlock::backward<gkt::CudaLaunch, uintptr_t>)
#endif
      .def("forward_cpu", &ResidualBlock::forward<gkt::CpuLaunch, int>)
      .def("backward_cpu", &ResidualBlock::backward<gkt::CpuLaunch, int>);
  py::class_<gkt_group_knowledge_loss_params>(module, "GroupKnowledgeLossParams",
                                              py::module_local())
      .def(py::init(&group_knowledge_loss_params));
  module.def("group_knowledge_loss_cpu", &group_knowledge_loss_cpu);
#ifdef GKT_WITH_CUDA
  module.def("group_knowledge_loss_workspace_cuda", &gkt_group_knowledge_loss_workspace_cuda);
  module.def("group_knowledge_loss_cuda", &group_knowledge_loss_cuda);
#endif
}
