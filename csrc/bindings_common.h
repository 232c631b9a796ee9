// What the bindings of every op need.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "gkt_abi.h"

namespace {

namespace py = pybind11;

inline void check(int status) {
  if (status == GKT_INVALID) throw py::value_error(gkt_last_error());
  if (status == GKT_UNSUPPORTED) {
    PyErr_SetString(PyExc_NotImplementedError, gkt_last_error());
    throw py::error_already_set();
  }
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

inline int place(int threads) { return threads; }
#ifdef GKT_WITH_CUDA
inline void* place(uintptr_t stream) { return pointer(stream); }
#endif

}  // namespace
