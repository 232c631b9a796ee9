// The calls that -fsanitize=bounds,alignment,shift,signed-integer-overflow,integer-divide-by-zero
// puts into kernels, in place of libubsan: array indices, misaligned vectors, overflowing offsets.
#include <string>

#include "runtime.h"

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
