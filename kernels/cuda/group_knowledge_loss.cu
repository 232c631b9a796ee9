// group_knowledge_loss on the GPU: one thread per row where rows are adjacent and classes are not
// (dense prediction), a warp for up to 1,024 classes, a block for more. What happens to a row is in
// group_knowledge_loss_row.cuh.
#include "group_knowledge_loss_row.cuh"

namespace gkt {
namespace {

constexpr int kThreads = 128;
constexpr int kMostClassesPerWarp = 1024;
constexpr int kMostClasses = 1 << 30;  // so that 32 bits count them

// Blocks that a multiprocessor must be able to hold. Left to itself, nvcc makes room for one more
// and spills a few registers for it.
template <class T, int kGroup>
constexpr int kBlocks = std::is_same_v<T, double> ? 3
                        : kGroup == 1             ? 7
                        : kGroup == kWarpSize     ? 5
                                                  : 4;

template <class T, int kGroup, int kVector, bool kOneLoop>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kGroup>)
    loss_kernel(const Params p, const Options<Compute<T>> o, uint32_t rows,
                const double* counted_rows, double* partials) {
  using Real = Compute<T>;
  constexpr int kGroups = kThreads / kGroup;
  GKT_DYNAMIC_SHARED(double, sums);  // (kGroups, S + 1), then (kGroups, S) of Softmax
  __shared__ Real scratch[kMaxWarps];
  const int terms = o.streams + 1, group = static_cast<int>(threadIdx.x) / kGroup;
  Softmax<Real>* visited = reinterpret_cast<Softmax<Real>*>(sums + kGroups * terms);
  for (int i = static_cast<int>(threadIdx.x); i < kGroups * terms; i += kThreads) sums[i] = 0;
  __syncthreads();
  RowLoss<T, kGroup, kVector, kOneLoop> loss{p,
                                             o,
                                             static_cast<Real>(counted_rows[0]),
                                             static_cast<Real>(counted_rows[1]),
                                             scratch,
                                             sums + group * terms,
                                             visited + group * o.streams,
                                             static_cast<int>(threadIdx.x) % kGroup};
  // 64 bits, so that the last step can't wrap around.
  for (int64_t row = int64_t{blockIdx.x} * kGroups + group; row < rows;
       row += int64_t{gridDim.x} * kGroups)
    loss.run(static_cast<uint32_t>(row));
  __syncthreads();
  for (int s = static_cast<int>(threadIdx.x); s < terms; s += kThreads) {
    double total = 0;
    for (int g = 0; g < kGroups; ++g) total += sums[g * terms + s];
    partials[int64_t{blockIdx.x} * terms + s] = total;
  }
}

// Adds up the blocks' sums, in an order that depends on their number alone.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Params p, int blocks, const double* counted_rows, const double* partials) {
  __shared__ double scratch[kMaxWarps];
  const int terms = static_cast<int>(p.streams) + 1;
  double loss = 0;
  for (int s = 0; s < terms; ++s) {
    double sum = 0;
    for (int block = static_cast<int>(threadIdx.x); block < blocks; block += kThreads)
      sum += partials[int64_t{block} * terms + s];
    sum = block_reduce(sum, Sum(), 0.0, scratch);
    const bool subnet_ce = s == p.streams;
    const double mean = sum / counted_rows[s == 0 || subnet_ce ? 0 : 1];
    const double weight = s == 0          ? p.ce_weight
                          : !subnet_ce    ? p.kd_weight
                          : p.streams > 1 ? p.subnet_ce_weight
                                          : 0.0;
    if (weight != 0) loss += weight * mean;
    if (threadIdx.x == 0 && !subnet_ce) static_cast<Real*>(p.terms)[s] = static_cast<Real>(mean);
  }
  if (threadIdx.x == 0) *static_cast<Real*>(p.loss) = static_cast<Real>(loss);
}

template <class T, int kGroup, int kVector>
void launch_loss(const Params& p, int64_t rows, const double* counted_rows, double* partials,
                 void* stream) {
  using Real = Compute<T>;
  constexpr int kGroups = kThreads / kGroup;
  int64_t blocks = (rows + kGroups - 1) / kGroups;
  if (blocks > GKT_MAX_PARTIALS) blocks = GKT_MAX_PARTIALS;
  const bool one_loop = p.streams - 1 <= p.groups;
  const size_t shared = kGroups * (static_cast<size_t>(p.streams + 1) * sizeof(double) +
                                   (one_loop ? 0 : p.streams) * sizeof(Softmax<Real>));
  if (blocks > 0)
    dispatch_bool(one_loop, [&](auto once) {
      launch<loss_kernel<T, kGroup, kVector, decltype(once)::value>>(
          dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared, stream, p,
          make_options<Real>(p), static_cast<uint32_t>(rows), counted_rows, partials);
    });
  launch<finish_kernel<Real>>(dim3(1), dim3(kThreads), 0, stream, p, static_cast<int>(blocks),
                              counted_rows, static_cast<const double*>(partials));
}

// Whether every row of every stream can be moved in 16-byte accesses.
template <class T>
bool vectorizable(const Params& p) {
  constexpr int kVector = kVectorSize<T>;
  const auto aligned = [&](const void* address, int64_t class_stride, int64_t stream_stride,
                           const int64_t* row_strides) {
    if (class_stride != 1 || !is_vectorizable<T, kVector>(address, p.classes, stream_stride))
      return false;
    for (int d = 0; d < p.row_dims; ++d)
      if (p.row_sizes[d] > 1 && row_strides[d] % kVector != 0) return false;
    return true;
  };
  return aligned(p.logits, p.logits_class_stride, p.logits_stream_stride, p.logits_row_strides) &&
         (p.gradient == nullptr || aligned(p.gradient, p.gradient_class_stride,
                                           p.gradient_stream_stride, p.gradient_row_strides));
}

template <class T>
void launch_for(const Params& p, int64_t rows, const double* counted_rows, double* partials,
                void* stream) {
  constexpr int64_t kMostStreamsPerThread = 16;  // whose sums fit into shared memory
  const bool rows_adjacent =
      p.logits_row_strides[p.row_dims - 1] == 1 && p.logits_class_stride != 1;
  const bool vectors = vectorizable<T>(p);
  if (rows_adjacent && p.classes <= kMostClassesPerWarp && p.streams <= kMostStreamsPerThread)
    launch_loss<T, 1, 1>(p, rows, counted_rows, partials, stream);
  else if (p.classes <= kMostClassesPerWarp && vectors)
    launch_loss<T, kWarpSize, kVectorSize<T>>(p, rows, counted_rows, partials, stream);
  else if (p.classes <= kMostClassesPerWarp)
    launch_loss<T, kWarpSize, 1>(p, rows, counted_rows, partials, stream);
  else if (vectors)
    launch_loss<T, kThreads, kVectorSize<T>>(p, rows, counted_rows, partials, stream);
  else
    launch_loss<T, kThreads, 1>(p, rows, counted_rows, partials, stream);
}

}  // namespace
}  // namespace gkt

extern "C" int gkt_group_knowledge_loss_cuda(const gkt_group_knowledge_loss_params* params,
                                             const double* counted_rows, double* partials,
                                             void* stream) {
  return gkt::guarded([&] {
    int64_t rows = 1;
    for (int d = 0; d < params->row_dims; ++d) rows *= params->row_sizes[d];
    if (rows > UINT32_MAX)
      throw gkt::InvalidArgument("logits has " + std::to_string(rows) +
                                 " rows; the CUDA kernel takes less than 2^32");
    if (params->classes > gkt::kMostClasses)
      throw gkt::InvalidArgument("logits has " + std::to_string(params->classes) +
                                 " classes; the CUDA kernel takes at most 2^30");
    gkt::dispatch_dtype(params->dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      gkt::launch_for<T>(*params, rows, counted_rows, partials, stream);
    });
  });
}
