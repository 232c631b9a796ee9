// The calls that the sanitizers put into kernels, in place of libtsan and libubsan:
// -fsanitize=thread for every load and store, -fsanitize=bounds,alignment,... for indices, vectors
// and integers.
#include <string>

#include "runtime.h"

using cuda_host::judge;
using cuda_host::Kind;

#define CALLER __builtin_return_address(0)

extern "C" {

#define CUDA_HOST_ACCESSES(bytes)                                                     \
  void __tsan_read##bytes(void* p) { judge(p, bytes, Kind::read, CALLER); }           \
  void __tsan_write##bytes(void* p) { judge(p, bytes, Kind::write, CALLER); }         \
  void __tsan_unaligned_read##bytes(void* p) { judge(p, bytes, Kind::read, CALLER); } \
  void __tsan_unaligned_write##bytes(void* p) { judge(p, bytes, Kind::write, CALLER); }
CUDA_HOST_ACCESSES(1)
CUDA_HOST_ACCESSES(2)
CUDA_HOST_ACCESSES(4)
CUDA_HOST_ACCESSES(8)
CUDA_HOST_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { judge(p, bytes, Kind::read, CALLER); }
void __tsan_write_range(void* p, size_t bytes) { judge(p, bytes, Kind::write, CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Atomics of the C++ library in host code; kernels use CUDA's.
#define CUDA_HOST_ATOMICS(bits)                                                                    \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {               \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t value, int) {        \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                                \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t value, \
                                                 int) {                                            \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                         \
  }
CUDA_HOST_ATOMICS(8)
CUDA_HOST_ATOMICS(32)
CUDA_HOST_ATOMICS(64)
}

namespace {

struct Location {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct OutOfBounds {
  Location location;
  const TypeDescriptor *array, *index;
};
struct TypeMismatch {
  Location location;
  const TypeDescriptor* type;
  unsigned char log_alignment, check;
};
struct Shift {
  Location location;
  const TypeDescriptor *value, *amount;
};
struct Overflow {
  Location location;
  const TypeDescriptor* type;
};

std::string at(const Location& location) {
  return " at " + cuda_host::site_name({location.file, static_cast<int>(location.line)});
}

void overflow(const Overflow* data, const char* operation) {
  cuda_host::report("arithmetic",
                    std::string(operation) + " overflows " + data->type->name + at(data->location));
}

}  // namespace

extern "C" {

void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  cuda_host::report("out of bounds", "index " + std::to_string(static_cast<intptr_t>(index)) +
                                         " of " + data->array->name + at(data->location));
}
void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  cuda_host::report("misaligned access", "address ends in " + std::to_string(address % 256) +
                                             ", which is no multiple of " +
                                             std::to_string(1 << data->log_alignment) + " as " +
                                             data->type->name + " needs" + at(data->location));
}
void __ubsan_handle_shift_out_of_bounds(Shift* data, uintptr_t, uintptr_t amount) {
  cuda_host::report("arithmetic", "shift of " + std::string(data->value->name) + " by " +
                                      std::to_string(static_cast<intptr_t>(amount)) +
                                      at(data->location));
}
void __ubsan_handle_divrem_overflow(Overflow* data, uintptr_t, uintptr_t) {
  overflow(data, "a division");
}
void __ubsan_handle_add_overflow(Overflow* data, uintptr_t, uintptr_t) { overflow(data, "a sum"); }
void __ubsan_handle_sub_overflow(Overflow* data, uintptr_t, uintptr_t) {
  overflow(data, "a difference");
}
void __ubsan_handle_mul_overflow(Overflow* data, uintptr_t, uintptr_t) {
  overflow(data, "a product");
}
void __ubsan_handle_negate_overflow(Overflow* data, uintptr_t) { overflow(data, "a negation"); }
}
