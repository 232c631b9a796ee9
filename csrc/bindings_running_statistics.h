// Running statistics for Python: tensors come as handles.
#pragma once

#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "bindings_tensors.h"
#include "running_statistics.h"

namespace {

// given: for each update the tensors of a StatisticsUpdate, in order; numbers: what else it has.
// Returns whether all were written; none are otherwise.
bool update_running_statistics(const py::list& given, const py::list& capsules,
                               const py::list& numbers) {
  Handles handles(given, capsules);  // before anything is looked at that may be refused
  std::vector<gkt::StatisticsUpdate> updates(numbers.size());
  for (size_t i = 0; i < updates.size(); ++i) {
    gkt::StatisticsUpdate& update = updates[i];
    for (gkt::Tensor* tensor :
         {&update.mean, &update.var, &update.running_mean, &update.running_var, &update.counter})
      *tensor = handles.take();
    std::tie(update.ghost, update.correction, update.momentum) =
        numbers[i].cast<std::tuple<int64_t, double, double>>();
  }
  return gkt::update_running_statistics(updates);
}

}  // namespace
