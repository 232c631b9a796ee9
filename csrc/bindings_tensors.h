// Tensors between Python and libtorch's C interface.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch_shim.h"

namespace {

namespace py = pybind11;

// Tensors come and go as handles in torch's capsules, each for one use.
struct DeleteHandle {
  void operator()(gkt::TensorHandle handle) const { gkt::torch_functions().delete_tensor(handle); }
};
using OwnedHandle = std::unique_ptr<std::remove_pointer_t<gkt::TensorHandle>, DeleteHandle>;

py::object capsule_of(gkt::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(PyCapsule_New(tensor.release(), nullptr, nullptr));
}

// The tensors of a call, in order: undefined where Python has None, and no capsule.
class Handles {
 public:
  Handles(const py::list& given, const py::list& capsules) {
    // All are owned before any is looked at, which may fail.
    std::vector<OwnedHandle> handles;
    for (py::handle capsule : capsules) {
      void* const handle = PyCapsule_GetPointer(capsule.ptr(), nullptr);
      if (handle == nullptr) throw py::error_already_set();
      handles.emplace_back(static_cast<gkt::TensorHandle>(handle));
    }
    size_t next = 0;
    for (py::handle tensor : given)
      tensors_.push_back(tensor.is_none() ? gkt::Tensor()
                                          : gkt::Tensor(handles.at(next++).release()));
  }
  gkt::Tensor take() { return std::move(tensors_.at(next_++)); }
  std::vector<gkt::Tensor> take(size_t count) {
    std::vector<gkt::Tensor> taken;
    while (count-- > 0) taken.push_back(take());
    return taken;
  }

 private:
  std::vector<gkt::Tensor> tensors_;
  size_t next_ = 0;
};

}  // namespace
