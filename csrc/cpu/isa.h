// Run-time choice of the instruction set. Each csrc/cpu/<op>.cpp is compiled once per set with
// GKT_ISA naming it; kernels live in namespace gkt::GKT_ISA, and the baseline build of the file
// also holds the extern "C" entry that calls the best set this CPU has. Code compiled for a wide
// set must not define inline functions or templates outside that namespace: the linker would be
// free to use the wide copy everywhere.
#pragma once

namespace gkt {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this CPU that was built, or a lower one named by GKT_ISA in the
// environment. Read once.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace gkt

// GKT_FOR_EACH_ISA(declarations) puts them into the namespace of every instruction set that is
// built; GKT_BEST(function) is the address of the one that this CPU runs. The
// former goes into namespace gkt, where the functions are.
#if defined(__x86_64__)
#define GKT_FOR_EACH_ISA(...) \
  namespace baseline {        \
  __VA_ARGS__                 \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__                 \
  }                           \
  namespace avx512 {          \
  __VA_ARGS__                 \
  }
#define GKT_BEST(function)                                              \
  (::gkt::active_isa() == ::gkt::Isa::avx512 ? &::gkt::avx512::function \
   : ::gkt::active_isa() == ::gkt::Isa::avx2 ? &::gkt::avx2::function   \
                                             : &::gkt::baseline::function)
#else
#define GKT_FOR_EACH_ISA(...) \
  namespace baseline {        \
  __VA_ARGS__                 \
  }
#define GKT_BEST(function) (&::gkt::baseline::function)
#endif
