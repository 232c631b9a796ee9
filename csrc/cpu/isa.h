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
