// The helpers of common.cuh, one kernel per helper.
#include "common.cuh"

namespace gkt {
namespace {

template <int Width>
__global__ void warp_sum_kernel(const float* x, float* sums) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  sums[i] = warp_reduce<Width>(x[i], Sum());
}

template <class T>
__global__ void block_statistics_kernel(const T* x, int64_t columns, Compute<T>* statistics) {
  using C = Compute<T>;
  __shared__ C sums[kMaxWarps];
  __shared__ SoftmaxPair<C> pairs[kMaxWarps];
  __shared__ Welford<C> welfords[kMaxWarps];
  x += blockIdx.x * columns;
  C sum = 0, maximum = -INFINITY;
  SoftmaxPair<C> pair{-INFINITY, 0};
  Welford<C> welford{0, 0, 0};
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
    const C value = to_compute(x[i]);
    sum += value;
    maximum = Max()(maximum, value);
    pair = MergeSoftmax()(pair, SoftmaxPair<C>{value, 1});
    welford.add(value);
  }
  sum = block_reduce(sum, Sum(), C(0), sums);
  maximum = block_reduce(maximum, Max(), C(-INFINITY), sums);
  pair = block_reduce(pair, MergeSoftmax(), SoftmaxPair<C>{-INFINITY, 0}, pairs);
  welford = block_reduce(welford, MergeWelford(), Welford<C>{0, 0, 0}, welfords);
  if (threadIdx.x == 0) {
    Compute<T>* row = statistics + blockIdx.x * 6;
    row[0] = sum;
    row[1] = maximum;
    row[2] = pair.maximum;
    row[3] = pair.sum;
    row[4] = welford.mean;
    row[5] = welford.m2 / welford.count;
  }
}

template <class T>
__global__ void double_kernel(const T* x, int64_t count, T* y) {
  constexpr int N = kVectorSize<T>;
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (first >= count) return;
  Compute<T> values[N];
  load_vector<T, N>(x + first, values);
  for (int i = 0; i < N; ++i) values[i] *= 2;
  store_vector<T, N>(y + first, values);
}

template <class T>
__global__ void convert_kernel(const float* x, T* y, float* back, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  y[i] = from_compute<T>(x[i]);
  back[i] = static_cast<float>(to_compute(y[i]));
}

// y[i] = i by way of dynamic shared memory of any size.
__global__ void shared_kernel(float* y) {
  GKT_DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}

}  // namespace
}  // namespace gkt

using namespace gkt;

extern "C" __attribute__((visibility("default"))) int warp_sum(const float* x, int count, int width,
                                                               float* sums) {
  return guarded([&] {
    const auto run = [&](auto constant) {
      launch<warp_sum_kernel<decltype(constant)::value>>(count / 64, 64, 0, nullptr, x, sums);
    };
    if (width == 32) return run(std::integral_constant<int, 32>());
    if (width == 8) return run(std::integral_constant<int, 8>());
    throw InvalidArgument("width is " + std::to_string(width) + "; it must be 8 or 32");
  });
}

extern "C" __attribute__((visibility("default"))) int block_statistics(const void* x, int dtype,
                                                                       int rows, int64_t columns,
                                                                       int threads,
                                                                       void* statistics) {
  return guarded([&] {
    dispatch_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      launch<block_statistics_kernel<T>>(rows, threads, 0, nullptr, static_cast<const T*>(x),
                                         columns, static_cast<Compute<T>*>(statistics));
    });
  });
}

extern "C" __attribute__((visibility("default"))) int double_elements(const void* x, int dtype,
                                                                      int64_t count, void* y) {
  return guarded([&] {
    dispatch_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (!is_vectorizable<T, kVectorSize<T>>(x, count, count))
        throw InvalidArgument("x is not vectorizable");
      const int64_t vectors = count / kVectorSize<T>;
      launch<double_kernel<T>>((vectors + 127) / 128, 128, 0, nullptr, static_cast<const T*>(x),
                               count, static_cast<T*>(y));
    });
  });
}

extern "C" __attribute__((visibility("default"))) int convert(const float* x, int dtype,
                                                              int64_t count, void* y, float* back) {
  return guarded([&] {
    dispatch_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      launch<convert_kernel<T>>((count + 127) / 128, 128, 0, nullptr, x, static_cast<T*>(y), back,
                                count);
    });
  });
}

extern "C" __attribute__((visibility("default"))) int count_in_shared(float* y, int threads,
                                                                      int64_t shared_bytes) {
  return guarded(
      [&] { launch<shared_kernel>(1, threads, static_cast<size_t>(shared_bytes), nullptr, y); });
}
