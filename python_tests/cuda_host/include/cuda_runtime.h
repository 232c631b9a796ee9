// The part of CUDA C++ that the kernels use, for a host compiler: see ../README.md. Found before
// the real cuda_runtime.h when a .cu file is compiled by build.py.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_host.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (cuda_host::thread_index())
#define blockIdx (cuda_host::block_index())
#define blockDim (cuda_host::block_dimensions())
#define gridDim (cuda_host::grid_dimensions())
static constexpr int warpSize = 32;

#define CUDA_HOST_SITE cuda_host::Site site = {__builtin_FILE(), __builtin_LINE()}

#define CUDA_HOST_VECTORS(type, scalar, size)                                   \
  struct alignas(2 * size) type##2 { scalar x, y; };                            \
  struct alignas(4 * size > 16 ? 16 : 4 * size) type##4 { scalar x, y, z, w; }; \
  inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; }          \
  inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(uchar, unsigned char, 1)
CUDA_HOST_VECTORS(ushort, unsigned short, 2)
CUDA_HOST_VECTORS(float, float, 4)
CUDA_HOST_VECTORS(int, int, 4)
CUDA_HOST_VECTORS(uint, unsigned, 4)
CUDA_HOST_VECTORS(double, double, 8)
#undef CUDA_HOST_VECTORS

inline void __syncthreads(CUDA_HOST_SITE) {
  cuda_host::block_barrier(cuda_host::Barrier::plain, 0, site);
}
inline int __syncthreads_count(int predicate, CUDA_HOST_SITE) {
  return cuda_host::block_barrier(cuda_host::Barrier::count, predicate, site);
}
inline int __syncthreads_or(int predicate, CUDA_HOST_SITE) {
  return cuda_host::block_barrier(cuda_host::Barrier::any, predicate, site);
}
inline int __syncthreads_and(int predicate, CUDA_HOST_SITE) {
  return cuda_host::block_barrier(cuda_host::Barrier::all, predicate, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_SITE) {
  cuda_host::warp_collective(cuda_host::Collective::warp_barrier, mask, 0, 0, 32, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return static_cast<unsigned>(
      cuda_host::warp_collective(cuda_host::Collective::ballot, mask, predicate != 0, 0, 32, site));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return static_cast<int>(
      cuda_host::warp_collective(cuda_host::Collective::any, mask, predicate != 0, 0, 32, site));
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return static_cast<int>(
      cuda_host::warp_collective(cuda_host::Collective::all, mask, predicate != 0, 0, 32, site));
}
inline unsigned __activemask() { return cuda_host::active_mask(); }
inline void __threadfence() { cuda_host::memory_fence(); }
inline void __threadfence_block() {}

namespace cuda_host {

template <class T>
inline T shuffle(Collective kind, unsigned mask, T value, int operand, int width, Site site) {
  using Bits =
      std::conditional_t<sizeof(T) == 8, uint64_t,
                         std::conditional_t<sizeof(T) == 4, uint32_t,
                                            std::conditional_t<sizeof(T) == 2, uint16_t, void>>>;
  const uint64_t bits =
      warp_collective(kind, mask, __builtin_bit_cast(Bits, value), operand, width, site);
  return __builtin_bit_cast(T, static_cast<Bits>(bits));
}

}  // namespace cuda_host

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(cuda_host::Collective::shuffle, mask, value, source, width, site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(cuda_host::Collective::shuffle_xor, mask, value, lanes, width, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(cuda_host::Collective::shuffle_up, mask, value, static_cast<int>(delta),
                            width, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE) {
  return cuda_host::shuffle(cuda_host::Collective::shuffle_down, mask, value,
                            static_cast<int>(delta), width, site);
}

[[noreturn]] inline void __trap(CUDA_HOST_SITE) { cuda_host::trap(site); }

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline T __ldcg(const T* address) {
  return *address;
}
template <class T>
inline void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
inline void __stcg(T* address, T value) {
  *address = value;
}

namespace cuda_host {

// Blocks run one after another and threads never preempt each other, so a plain update is atomic;
// it is hidden from the instrumentation, which has seen atomic_access().
template <class T, class Update>
__attribute__((no_sanitize("thread"), noinline)) T atomic_update(T* address, Update update) {
  atomic_access(address, sizeof(T), std::is_floating_point_v<T>);
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace cuda_host

template <class T>
inline T atomicAdd(T* address, std::common_type_t<T> value) {
  return cuda_host::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
inline T atomicSub(T* address, std::common_type_t<T> value) {
  return cuda_host::atomic_update(address, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
inline T atomicMax(T* address, std::common_type_t<T> value) {
  return cuda_host::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
inline T atomicMin(T* address, std::common_type_t<T> value) {
  return cuda_host::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
inline T atomicOr(T* address, std::common_type_t<T> value) {
  return cuda_host::atomic_update(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
inline T atomicAnd(T* address, std::common_type_t<T> value) {
  return cuda_host::atomic_update(address, [=](T old) { return static_cast<T>(old & value); });
}
template <class T>
inline T atomicExch(T* address, std::common_type_t<T> value) {
  return cuda_host::atomic_update(address, [=](T) { return static_cast<T>(value); });
}
template <class T>
inline T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return cuda_host::atomic_update(
      address, [=](T old) { return old == expected ? static_cast<T>(value) : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return cuda_host::atomic_update(address,
                                  [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

#define CUDA_HOST_MIN_MAX(type)                             \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
CUDA_HOST_MIN_MAX(int)
CUDA_HOST_MIN_MAX(unsigned)
CUDA_HOST_MIN_MAX(long)
CUDA_HOST_MIN_MAX(unsigned long)
CUDA_HOST_MIN_MAX(long long)
CUDA_HOST_MIN_MAX(unsigned long long)
#undef CUDA_HOST_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

using std::isfinite;
using std::isinf;
using std::isnan;

inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }

inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= ((x >> bit) & 1u) << (31 - bit);
  return reversed;
}
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorSystemDriverMismatch = 803,
  cudaErrorCompatNotSupportedOnDevice = 804
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(cuda_host::take_last_error());
}
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "an error that the host runtime never reports by itself";
  }
}
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return static_cast<cudaError_t>(cuda_host::set_attribute());
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 163 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

namespace cuda_host {

template <class... Parameters, class... Arguments>
inline void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  launch(
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](const void* opaque) {
        const Call& call = *static_cast<const Call*>(opaque);
        std::apply(call.kernel, call.arguments);
      },
      &call, sizeof(call));
}

}  // namespace cuda_host
