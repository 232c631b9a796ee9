// Every entry of the ABI runs inside guarded(): a C++ exception becomes a status and a message.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

#include "gkt_abi.h"

namespace gkt {

void set_last_error(const char* message) noexcept;

struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return GKT_OK;
  } catch (const InvalidArgument& error) {
    set_last_error(error.what());
    return GKT_INVALID;
  } catch (const Unsupported& error) {
    set_last_error(error.what());
    return GKT_UNSUPPORTED;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return GKT_FAILED;
  }
}

}  // namespace gkt
