// Residual blocks for Python: tensors in and out as handles.
#pragma once

#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <vector>

#include "bindings_common.h"
#include "bindings_tensors.h"
#include "residual_block.h"

namespace {

// A residual block that is described once; see residual_block.h. A call that it isn't for, or at
// which torch fails, returns None: what comes next says why.
class ResidualBlock {
 public:
  // geometry: seven numbers of each convolution.
  ResidualBlock(const std::vector<int64_t>& geometry, std::vector<double> eps, bool shortcut,
                int64_t ghosts, std::optional<int64_t> lead_rows, bool recompute,
                std::optional<int32_t> dtype)
      : block_{{}, std::move(eps), shortcut, ghosts, lead_rows, recompute, dtype} {
    for (size_t i = 0; i + 7 <= geometry.size(); i += 7) {
      const int64_t* g = &geometry[i];
      block_.convolutions.push_back({{g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]}, g[6]});
    }
  }

  // given: x, skip, keep, parameters, then mean, variance and counter of each update; updates: as
  // of `passes.forward`. Returns y, statistics, convolved, masks and activations.
  template <class Launch, class Where>
  py::object forward(const py::list& given, const py::list& capsules, py::list updates,
                     Where where) const {
    std::vector<gkt::RunningUpdate> running(block_.layers());
    const auto note_done = [&] {
      for (size_t i = 0; i < running.size(); ++i)
        if (running[i].done) updates[i] = py::none();
    };
    try {
      Handles handles(given, capsules);
      const gkt::BlockTensors in = inputs(handles);
      for (size_t i = 0; i < running.size(); ++i) {
        if (updates[i].is_none()) continue;
        running[i].mean = handles.take();
        running[i].var = handles.take();
        running[i].counter = handles.take();
        running[i].momentum = updates[i][py::int_(2)].cast<double>();
      }
      gkt::BlockResults out;
      {
        py::gil_scoped_release release;
        out = gkt::BlockRun<Launch>(block_, in, {place(where)}).forward(running);
      }
      note_done();
      py::list results;
      results.append(capsule_of(out.y));
      for (auto* part : {&out.statistics, &out.convolved, &out.masks, &out.activations})
        for (gkt::Tensor& tensor : *part) results.append(capsule_of(tensor));
      return std::move(results);
    } catch (...) {
      note_done();
      return failed();
    }
  }

  // given: the gradient of y, x, skip, keep, parameters, and what `forward` returned but y. needs:
  // which of x, skip, keep and parameters want a gradient. Returns the places of gradients, and
  // these.
  template <class Launch, class Where>
  py::object backward(const py::list& given, const py::list& capsules,
                      const std::vector<bool>& needs, Where where) const {
    try {
      Handles handles(given, capsules);
      const gkt::Tensor grad_y = handles.take();
      const gkt::BlockTensors in = inputs(handles);
      const size_t depth = block_.depth(), norms = depth + (block_.normed_shortcut() ? 1 : 0);
      gkt::BlockResults saved;
      saved.statistics = handles.take(norms);
      saved.convolved = handles.take(norms);
      saved.masks = handles.take(block_.recompute ? 1 : depth);
      saved.activations = handles.take(block_.recompute ? 0 : depth - 1);
      std::vector<gkt::Tensor> gradients;
      {
        py::gil_scoped_release release;
        gradients =
            gkt::BlockRun<Launch>(block_, in, {place(where)}).backward(grad_y, saved, needs);
      }
      py::list places, results;
      for (size_t i = 0; i < gradients.size(); ++i) {
        if (!gradients[i]) continue;
        places.append(i);
        results.append(capsule_of(gradients[i]));
      }
      return py::make_tuple(places, results);
    } catch (...) {
      return failed();
    }
  }

 private:
  gkt::BlockTensors inputs(Handles& handles) const {
    gkt::BlockTensors in;
    in.x = handles.take();
    in.skip = handles.take();
    in.keep = handles.take();
    in.parameters = handles.take(gkt::kSlots * block_.layers());
    return in;
  }

  // What becomes of the exception that is being handled.
  static py::object failed() {
    try {
      throw;
    } catch (const gkt::Unfit&) {
    } catch (const gkt::TorchError&) {
    } catch (const gkt::KernelError& error) {
      check(error.status);
    }
    return py::none();
  }

  gkt::BlockDescription block_;
};

}  // namespace
