// One planted bug per kernel; each has a twin without it, chosen by `correct`.
#include "common.cuh"

namespace gkt {
namespace {

__global__ void shift_kernel(const float* x, float* y, int count, bool correct) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) y[i] = x[correct && i + 1 == count ? i : i + 1];
}

__global__ void barrier_kernel(float* y, bool correct) {
  __shared__ float tile[64];
  tile[threadIdx.x] = threadIdx.x;
  if (correct || threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = correct ? tile[63 - threadIdx.x] : tile[threadIdx.x];
}

__global__ void two_barriers_kernel(float* y, bool correct) {
  if (correct || threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = threadIdx.x;
}

__global__ void exit_kernel(float* y, bool correct) {
  if (!correct && threadIdx.x == 63) return;
  __syncthreads();
  y[threadIdx.x] = threadIdx.x;
}

__global__ void shuffle_kernel(float* y, bool correct) {
  float value = threadIdx.x;
  if (correct || threadIdx.x % 32 < 24) value = __shfl_down_sync(kFullMask, value, 1);
  y[threadIdx.x] = value;
}

__global__ void shuffle_source_kernel(float* y, bool correct) {
  float value = threadIdx.x;
  const int lane = threadIdx.x % 32;
  if (lane < 16) value = __shfl_sync(0xffffu, value, correct ? 15 - lane : 31 - lane);
  y[threadIdx.x] = value;
}

__global__ void vote_kernel(float* y, bool correct) {
  const int lane = threadIdx.x % 32;
  y[threadIdx.x] = __ballot_sync(correct ? kFullMask : 0x7fffffffu, lane % 2);
}

__global__ void uninitialised_kernel(float* y, bool correct) {
  __shared__ float tile[64];
  if (correct || threadIdx.x != 5) tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void uninitialised_dynamic_kernel(float* y, bool correct) {
  GKT_DYNAMIC_SHARED(float, tile);
  if (correct || threadIdx.x != 5) tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void dynamic_bounds_kernel(float* y, bool correct) {
  GKT_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + (correct ? 0 : 1)] = threadIdx.x;
  y[threadIdx.x] = threadIdx.x;
}

__global__ void static_bounds_kernel(float* y, bool correct) {
  __shared__ float tile[64];
  tile[threadIdx.x + (correct ? 0 : 1)] = threadIdx.x;
  y[threadIdx.x] = threadIdx.x;
}

__device__ void fill(float* begin, int count) {
  if (static_cast<int>(threadIdx.x) < count) begin[threadIdx.x] = threadIdx.x;
}

__global__ void static_pointer_kernel(float* y, bool correct) {
  __shared__ float first[32], second[32];
  fill(second, 32);
  __syncthreads();
  fill(first, correct ? 32 : 33);
  __syncthreads();
  y[threadIdx.x] = first[threadIdx.x % 32] + second[threadIdx.x % 32];
}

__global__ void shared_race_kernel(float* y, bool correct) {
  __shared__ float tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const float value = tile[63 - threadIdx.x];
  if (correct) __syncthreads();
  tile[threadIdx.x] = value;
  y[threadIdx.x] = value;
}

__global__ void warp_race_kernel(float* y, bool correct) {
  __shared__ float tile[64];
  tile[threadIdx.x] = threadIdx.x;
  if (correct) __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void write_race_kernel(float* y, bool correct) {
  __shared__ float tile[64];
  tile[correct ? threadIdx.x : threadIdx.x / 2] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x / 2];
}

__global__ void byte_kernel(float* y, bool correct) {
  __shared__ unsigned char bytes[64];
  bytes[threadIdx.x] = threadIdx.x;
  if (correct) __syncthreads();
  y[threadIdx.x] = bytes[threadIdx.x ^ 1];
}

__global__ void block_race_kernel(float* y, bool correct) {
  const int i = threadIdx.x + (correct ? 64 * blockIdx.x : 32 * blockIdx.x);
  y[i] = threadIdx.x;
}

__global__ void last_block_kernel(float* y, unsigned* arrived, bool correct) {
  __shared__ bool last;
  y[64 * blockIdx.x + threadIdx.x] = threadIdx.x;
  if (correct) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) + 1 == gridDim.x;
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (int block = 0; block < static_cast<int>(gridDim.x); ++block)
    sum += y[64 * block + threadIdx.x];
  y[threadIdx.x] = sum;
}

__global__ void misaligned_kernel(float* y, bool correct) {
  float values[4] = {0, 1, 2, 3};
  store_vector<float, 4>(y + 4 * threadIdx.x + (correct ? 0 : 1), values);
}

__global__ void overflow_kernel(float* y, int rows, bool correct) {
  const int64_t offset = correct ? int64_t{rows} * rows : int64_t{rows * rows};
  y[threadIdx.x] = static_cast<float>(offset);
}

__global__ void float_atomic_kernel(float* y, bool correct) {
  if (correct)
    y[threadIdx.x] = 1;
  else
    atomicAdd(y, 1.0f);
}

__global__ void null_kernel(float* y, bool correct) {
  float* const pointer = correct ? y : nullptr;
  pointer[threadIdx.x] = 1;
}

__global__ void endless_kernel(float* y, bool correct) {
  for (int i = 0; correct ? i < 10 : y[threadIdx.x] < 1; ++i) y[threadIdx.x] = 0;
}

__global__ void ticket_kernel(unsigned* counter, float* y, bool correct) {
  const unsigned ticket = atomicAdd(counter, 1u);
  y[blockIdx.x * blockDim.x + threadIdx.x + (correct ? 0 : 128)] = ticket;
}

__global__ void host_pointer_kernel(const int* count, float* y) { y[threadIdx.x] = *count; }

}  // namespace

// Its variables are in sections of their own, as they may be defined in several files.
template <class T>
__global__ void external_kernel(float* y, bool correct) {
  __shared__ T first[32], second[32];
  fill(second, 32);
  __syncthreads();
  fill(first, correct ? 32 : 33);
  __syncthreads();
  y[threadIdx.x] = first[threadIdx.x % 32] + second[threadIdx.x % 32];
}

}  // namespace gkt

using namespace gkt;

#define PLANTED(name, ...)                                                                       \
  extern "C" __attribute__((visibility("default"))) int name(float* x, float* y, bool correct) { \
    (void)x;                                                                                     \
    return guarded([&] { __VA_ARGS__; });                                                        \
  }

PLANTED(shift, launch(shift_kernel, 2, 64, 0, nullptr, x, y, 128, correct))
PLANTED(barrier, launch(barrier_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(two_barriers, launch(two_barriers_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(exited, launch(exit_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(shuffle, launch(shuffle_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(shuffle_source, launch(shuffle_source_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(vote, launch(vote_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(partial_warp, launch(shuffle_kernel, 1, correct ? 64 : 40, 0, nullptr, y, true))
PLANTED(uninitialised, launch(uninitialised_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(uninitialised_dynamic,
        launch(uninitialised_dynamic_kernel, 1, 64, 256, nullptr, y, correct))
PLANTED(dynamic_bounds, launch(dynamic_bounds_kernel, 1, 64, 256, nullptr, y, correct))
PLANTED(static_bounds, launch(static_bounds_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(static_pointer, launch(static_pointer_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(external, launch(external_kernel<float>, 1, 64, 0, nullptr, y, correct))
PLANTED(shared_race, launch(shared_race_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(warp_race, launch(warp_race_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(write_race, launch(write_race_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(byte_race, launch(byte_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(block_race, launch(block_race_kernel, 2, 64, 0, nullptr, y, correct))
PLANTED(last_block,
        launch(last_block_kernel, 2, 64, 0, nullptr, y, reinterpret_cast<unsigned*>(x), correct))
PLANTED(misaligned, launch(misaligned_kernel, 1, 16, 0, nullptr, y, correct))
PLANTED(overflow, launch(overflow_kernel, 1, 64, 0, nullptr, y, 50000, correct))
PLANTED(float_atomic, launch(float_atomic_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(null_pointer, launch(null_kernel, 1, 64, 0, nullptr, y, correct))
PLANTED(endless, launch(endless_kernel, 1, 32, 0, nullptr, y, correct))
PLANTED(tickets,
        launch(ticket_kernel, 2, 64, 0, nullptr, reinterpret_cast<unsigned*>(x), y, correct))
PLANTED(host_pointer, {
  const int count = 3;
  if (!correct) launch(host_pointer_kernel, 1, 64, 0, nullptr, &count, y);
})
PLANTED(block_too_large, launch(barrier_kernel, 1, correct ? 64 : 2048, 0, nullptr, y, true))
