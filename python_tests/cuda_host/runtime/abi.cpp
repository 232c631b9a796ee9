// What a library built by build.py exports besides its kernels' entries.
#include "guard.h"

extern "C" __attribute__((visibility("default"))) const char* cuda_host_last_error() {
  return gkt_last_error();
}

// Stands for every CPU kernel that bindings.cpp names: build.py leaves them out.
extern "C" int gkt_no_cpu_kernel() {
  gkt::set_last_error("this build has CUDA kernels only");
  return GKT_FAILED;
}
