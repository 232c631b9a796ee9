// What every CUDA kernel shares: types, 16-byte memory access, reductions in a fixed order,
// launches. Written for nvcc and for the host build of python_tests/cuda_host alike.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "guard.h"

namespace gkt {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxWarps = 32;  // of a block

// Types: storage type T, computed in Compute<T> (double for double, float otherwise).

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_compute(float value) { return value; }
__device__ __forceinline__ double to_compute(double value) { return value; }
__device__ __forceinline__ float to_compute(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_compute(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_compute(Compute<T> value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

// Memory: N elements of T in one access of at most 16 bytes.

template <class T>
constexpr int kVectorSize = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  static_assert(N * sizeof(T) <= 16, "one access moves at most 16 bytes");
  T data[N];
};

template <class T, int N>
__device__ __forceinline__ void unpack(const Vector<T, N>& packed, Compute<T> (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_compute(packed.data[i]);
}

template <class T, int N>
__device__ __forceinline__ Vector<T, N> pack(const Compute<T> (&values)[N]) {
  Vector<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) packed.data[i] = from_compute<T>(values[i]);
  return packed;
}

// Addresses must be multiples of N * sizeof(T).

template <class T, int N>
__device__ __forceinline__ void load_vector(const T* address, Compute<T> (&values)[N]) {
  const Vector<T, N> packed = *reinterpret_cast<const Vector<T, N>*>(address);
  unpack(packed, values);
}

template <class T, int N>
__device__ __forceinline__ void store_vector(T* address, const Compute<T> (&values)[N]) {
  *reinterpret_cast<Vector<T, N>*>(address) = pack<T, N>(values);
}

#ifdef __CUDACC__
// The integers that one access of so many bytes moves.
template <int bytes>
using Word = std::conditional_t<
    bytes == 16, uint4,
    std::conditional_t<bytes == 8, uint2,
                       std::conditional_t<bytes == 4, unsigned, unsigned short>>>;
#endif

// As it lies in memory, so that several loads are under way before the first is converted. For what
// no thread writes while the kernel runs.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> load_read_only(const T* address) {
#ifdef __CUDACC__
  using Bits = Word<sizeof(Vector<T, N>)>;
  const Bits bits = __ldg(reinterpret_cast<const Bits*>(address));
  Vector<T, N> packed;
  memcpy(&packed, &bits, sizeof(packed));
  return packed;
#else
  return *reinterpret_cast<const Vector<T, N>*>(address);
#endif
}

// What the second-level cache may give up first, for results that are too many to stay there.
template <class T, int N>
__device__ __forceinline__ void store_streaming(T* address, const Vector<T, N>& packed) {
#ifdef __CUDACC__
  using Bits = Word<sizeof(Vector<T, N>)>;
  Bits bits;
  memcpy(&bits, &packed, sizeof(packed));
  __stcs(reinterpret_cast<Bits*>(address), bits);
#else
  *reinterpret_cast<Vector<T, N>*>(address) = packed;
#endif
}

// Whether rows of `size` elements that lie `stride` elements apart can be read N elements at a
// time.
template <class T, int N>
inline bool is_vectorizable(const void* address, int64_t size, int64_t stride) {
  return reinterpret_cast<uintptr_t>(address) % (N * sizeof(T)) == 0 && size % N == 0 &&
         stride % N == 0;
}

// What is reduced: a plain number, or one of the two pairs below. combine(lower, upper) takes the
// value of the lower lanes first, so that every lane computes the same bits.

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T lower, T upper) const {
    return lower + upper;
  }
};

// NaN wins, unlike fmax.
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T lower, T upper) const {
    return lower > upper || lower != lower ? lower : upper;
  }
};

// Online softmax: the maximum of some values and the sum of exp(value - maximum). No values: {-inf,
// 0}.
template <class T>
struct SoftmaxPair {
  T maximum, sum;
};

struct MergeSoftmax {
  template <class T>
  __device__ __forceinline__ SoftmaxPair<T> operator()(SoftmaxPair<T> lower,
                                                       SoftmaxPair<T> upper) const {
    const T maximum = Max()(lower.maximum, upper.maximum);
    return {maximum, rescale(lower, maximum) + rescale(upper, maximum)};
  }

 private:
  // Equal maxima give the factor 1 without exp(inf - inf).
  template <class T>
  __device__ __forceinline__ static T rescale(SoftmaxPair<T> pair, T maximum) {
    return pair.maximum == maximum ? pair.sum : pair.sum * exp(pair.maximum - maximum);
  }
};

// Welford: mean, sum of squared differences from it, and number of some values. No values: {0, 0,
// 0}.
template <class T>
struct Welford {
  T mean, m2, count;

  __device__ __forceinline__ void add(T value) {
    count += 1;
    const T delta = value - mean;
    mean += delta / count;
    m2 += delta * (value - mean);
  }
};

struct MergeWelford {
  template <class T>
  __device__ __forceinline__ Welford<T> operator()(Welford<T> lower, Welford<T> upper) const {
    const T count = lower.count + upper.count;
    const T upper_share = count == 0 ? T(0) : upper.count / count;
    const T delta = upper.mean - lower.mean;
    return {lower.mean + delta * upper_share,
            lower.m2 + upper.m2 + delta * delta * lower.count * upper_share, count};
  }
};

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(kFullMask, value, lanes);
}
template <class T>
__device__ __forceinline__ SoftmaxPair<T> shuffle_xor(SoftmaxPair<T> value, int lanes) {
  return {shuffle_xor(value.maximum, lanes), shuffle_xor(value.sum, lanes)};
}
template <class T>
__device__ __forceinline__ Welford<T> shuffle_xor(Welford<T> value, int lanes) {
  return {shuffle_xor(value.mean, lanes), shuffle_xor(value.m2, lanes),
          shuffle_xor(value.count, lanes)};
}

// Reduces over groups of Width neighbouring lanes; every lane gets its group's result. All 32 lanes
// of the warp must call it, and blockDim.x must be a multiple of Width.
template <int Width = kWarpSize, class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
  static_assert(Width >= 1 && Width <= kWarpSize && (Width & (Width - 1)) == 0,
                "a power of two up to 32");
  const int lane = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int lanes = 1; lanes < Width; lanes *= 2) {
    const T other = shuffle_xor(value, lanes);
    value = (lane & lanes) != 0 ? combine(other, value) : combine(value, other);
  }
  return value;
}

// Reduces over a one-dimensional block of whole warps; every thread gets the result. `scratch` is
// shared memory for kMaxWarps values, free again on return; `identity` is the value of no input.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, Combine combine, T identity, T* scratch) {
  const int thread = static_cast<int>(threadIdx.x),
            warps = static_cast<int>(blockDim.x) / kWarpSize;
  value = warp_reduce(value, combine);
  if (warps == 1) return value;
  if (thread % kWarpSize == 0) scratch[thread / kWarpSize] = value;
  __syncthreads();
  const int lane = thread % kWarpSize;
  value = warp_reduce(lane < warps ? scratch[lane] : identity, combine);
  __syncthreads();
  return value;
}

// Dynamic shared memory, 16-byte aligned: GKT_DYNAMIC_SHARED(float, tile); declares `float* tile`.
#ifdef __CUDACC__
#define GKT_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char gkt_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(gkt_dynamic_shared)
#else
#define GKT_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(cuda_host::dynamic_shared_memory())
#endif

// Host side.

// Whether an error means that this build doesn't fit the GPU or its driver.
inline bool is_unsupported(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
      return true;
    default:
      return false;
  }
}

// Throws an error with what it happened in. A call that fails also leaves its error for the next
// launch to report, which is not that launch's: it is taken away here.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  const std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (is_unsupported(error)) throw Unsupported(message);
  throw std::runtime_error(message);
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), with more than 48 KiB of dynamic
// shared memory allowed; throws what the launch reports. An empty grid is an error, as in CUDA.
template <class... Parameters, class... Arguments>
inline void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "dynamic shared memory");
#ifdef __CUDACC__
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  (void)stream;
  cuda_host::launch_kernel(kernel, grid, block, shared_bytes, arguments...);
  cuda_host::raise_pending_error();
#endif
  check_cuda(cudaGetLastError(), "kernel launch");
}

// The same with the kernel as a template argument. Not for a generic lambda whose parameters the
// kernel does not depend on: g++ does not instantiate it there.
template <auto Kernel, class... Arguments>
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  launch(Kernel, grid, block, shared_bytes, stream, arguments...);
}

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>()) with the storage type of a gkt_dtype:
// dispatch_dtype(params.dtype, [&](auto type) { using T = typename decltype(type)::type; ... });
template <class Body>
inline void dispatch_dtype(int dtype, Body&& body) {
  switch (dtype) {
    case GKT_FLOAT32:
      return body(Type<float>());
    case GKT_FLOAT64:
      return body(Type<double>());
    case GKT_BFLOAT16:
      return body(Type<__nv_bfloat16>());
    case GKT_FLOAT16:
      return body(Type<__half>());
    default:
      throw InvalidArgument("dtype is " + std::to_string(dtype) + "; it must be a gkt_dtype");
  }
}

// Calls body(std::true_type()) or body(std::false_type()): decltype(flag)::value is a constant.
template <class Body>
inline void dispatch_bool(bool flag, Body&& body) {
  return flag ? body(std::true_type()) : body(std::false_type());
}

}  // namespace gkt
