// What the CUDA headers of this folder need from the runtime (runtime/*.cpp): the identity of the
// running thread, collectives, atomics and launches. Everything is out of line, so that the
// instrumentation of kernel code never sees the runtime's own memory.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

namespace cuda_host {

struct Site {
  const char* file;
  int line;
};

enum class Collective {
  shuffle,
  shuffle_xor,
  shuffle_up,
  shuffle_down,
  ballot,
  any,
  all,
  warp_barrier
};
enum class Barrier { plain, count, any, all };

// A thread's identity never changes while its kernel runs: `const` lets the compiler read it once.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_dimensions();
__attribute__((const)) uint3 grid_dimensions();
void* dynamic_shared_memory();

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int operand, int width,
                         Site site);
int block_barrier(Barrier kind, int predicate, Site site);
unsigned active_mask();
void memory_fence();

// Loads *address for an atomic update, after checking it like any other access.
void atomic_access(const void* address, size_t bytes, bool is_float);
[[noreturn]] void trap(Site site);

using Entry = void (*)(const void* arguments);

// Runs entry(arguments) once per thread of every block, in order. Returns nothing; a violation
// becomes the pending error that raise_pending_error() throws.
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Entry entry,
            const void* arguments, size_t argument_bytes);
void raise_pending_error();

// The cudaError_t with which launches are refused (cuda_host_refuse_launches); 0: they run.
int refusal();

// cudaGetLastError() and a cudaFuncSetAttribute() that fails (cuda_host_refuse_attributes).
int take_last_error();
int set_attribute();

}  // namespace cuda_host
