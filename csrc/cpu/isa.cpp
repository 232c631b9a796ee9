#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "guard.h"

namespace gkt {
namespace {

thread_local std::string last_error;

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("GKT_ISA");
  if (wanted == nullptr) return best;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::strcmp(wanted, isa_name(isa)) == 0 && isa <= best) return isa;
  return best;
}

}  // namespace

void set_last_error(const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    default:
      return "baseline";
  }
}

}  // namespace gkt

extern "C" const char* gkt_last_error(void) { return gkt::last_error.c_str(); }
