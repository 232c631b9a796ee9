// group_knowledge_loss on the GPU: one thread per row where rows are adjacent and classes are not
// (dense prediction), a warp for up to 1,024 classes, a block for more. What happens to a row is in
// group_knowledge_loss_row.cuh. Three launches: rows are counted (group_knowledge_loss_count.cuh;
// not for probabilities), every block leaves sums of its rows behind, and a last block adds them
// up.
#include "group_knowledge_loss_row.cuh"

namespace gkt {
namespace {

constexpr int kMostClassesPerWarp = 1024;
constexpr int kMostClasses = 1 << 30;  // so that 32 bits count them
// Of a block, for rows that are held: leaves room for two blocks on every architecture, and is
// within what each of them grants.
constexpr size_t kMostShared = 80 * 1024;

// Memory that lasts from one launch to the next.
struct Workspace {
  ClassIndices* shares;  // (share_count)
  int share_count;
  double* partials;  // (GKT_MAX_PARTIALS, S + 1)
};

Workspace workspace_at(void* address, const Params& p, int64_t rows) {
  ClassIndices* shares = static_cast<ClassIndices*>(address);
  return {shares, count_blocks(p, rows), reinterpret_cast<double*>(shares + kMaxCountBlocks)};
}

// Blocks that a multiprocessor must be able to hold. Left to itself, nvcc makes room for one more
// and spills a few registers for it.
template <class T, int kGroup>
constexpr int kBlocks = std::is_same_v<T, double> ? 3
                        : kGroup == 1             ? 6
                                                  : 4;

// A block's dynamic shared memory: sums (kGroups, S + 1); softmaxes (kGroups, S) for several loops;
// held rows (slots, held_vectors, kThreads).
template <class T, int kGroup, int kVector, bool kOneLoop>
struct SharedMemory {
  int64_t sums, softmaxes, held;  // bytes
  int held_vectors;

  static SharedMemory of(const Params& p) {
    constexpr int kGroups = kThreads / kGroup;
    SharedMemory m{};
    m.sums = (kGroups * (p.streams + 1) * int64_t{sizeof(double)} + 15) / 16 * 16;
    m.softmaxes = kOneLoop ? 0 : kGroups * p.streams * int64_t{sizeof(Softmax<Compute<T>>)};
    m.softmaxes = (m.softmaxes + 15) / 16 * 16;
    m.held_vectors = static_cast<int>((p.classes + kGroup * kVector - 1) / (kGroup * kVector));
    const int64_t slots = kOneLoop && p.streams > 2 ? 2 : p.streams;
    m.held = slots * m.held_vectors * int64_t{sizeof(Vector<T, kVector>)} * kThreads;
    if (kGroup > kWarpSize || m.sums + m.softmaxes + m.held > int64_t{kMostShared}) m.held = 0;
    return m;
  }

  size_t bytes() const { return static_cast<size_t>(sums + softmaxes + held); }
};

template <class T, int kGroup, int kVector, bool kOneLoop>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kGroup>)
    loss_kernel(const Params p, const Options<Compute<T>> o, uint32_t rows, const Workspace w,
                const SharedMemory<T, kGroup, kVector, kOneLoop> m) {
  using Real = Compute<T>;
  constexpr int kGroups = kThreads / kGroup;
  GKT_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ Real scratch[kMaxWarps];
  __shared__ int64_t count_scratch[kMaxWarps];
  const int terms = o.streams + 1, group = static_cast<int>(threadIdx.x) / kGroup;
  double* sums = reinterpret_cast<double*>(shared);
  for (int i = static_cast<int>(threadIdx.x); i < kGroups * terms; i += kThreads) sums[i] = 0;
  __syncthreads();
  const CountedRows counted = count_rows(p, rows, w.shares, w.share_count, count_scratch);
  Softmax<Real>* visited = reinterpret_cast<Softmax<Real>*>(shared + m.sums);
  Vector<T, kVector>* held =
      m.held == 0
          ? nullptr
          : reinterpret_cast<Vector<T, kVector>*>(shared + m.sums + m.softmaxes) + threadIdx.x;
  RowLoss<T, kGroup, kVector, kOneLoop> loss{p,
                                             o,
                                             static_cast<Real>(counted.ce),
                                             static_cast<Real>(counted.kd),
                                             static_cast<Real>(counted.subnet_ce),
                                             scratch,
                                             sums + group * terms,
                                             visited + group * o.streams,
                                             held,
                                             m.held_vectors,
                                             static_cast<int>(threadIdx.x) % kGroup};
  // 64 bits, so that the last step can't wrap around.
  for (int64_t row = int64_t{blockIdx.x} * kGroups + group; row < rows;
       row += int64_t{gridDim.x} * kGroups)
    loss.run(static_cast<uint32_t>(row));
  __syncthreads();
  for (int s = static_cast<int>(threadIdx.x); s < terms; s += kThreads) {
    double total = 0;
    for (int g = 0; g < kGroups; ++g) total += sums[g * terms + s];
    w.partials[int64_t{blockIdx.x} * terms + s] = total;
  }
}

// Adds up the blocks' sums, in an order that depends on their number alone; reports a class index
// that is out of range.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Params p, uint32_t rows, int blocks, const Workspace w, int64_t* report) {
  __shared__ double scratch[kMaxWarps];
  __shared__ int64_t count_scratch[kMaxWarps];
  const CountedRows counted = count_rows(p, rows, w.shares, w.share_count, count_scratch);
  const int terms = static_cast<int>(p.streams) + 1;
  double loss = counted.indices.wrong > 0 ? NAN : 0.0;
  for (int s = 0; s < terms; ++s) {
    double sum = 0;
    for (int block = static_cast<int>(threadIdx.x); block < blocks; block += kThreads)
      sum += w.partials[int64_t{block} * terms + s];
    sum = block_reduce(sum, Sum(), 0.0, scratch);
    const bool subnet_ce = s == p.streams;
    const double mean = sum / (s == 0 ? counted.ce : subnet_ce ? counted.subnet_ce : counted.kd);
    const double weight = s == 0          ? p.ce_weight
                          : !subnet_ce    ? p.kd_weight
                          : p.streams > 1 ? p.subnet_ce_weight
                                          : 0.0;
    if (weight != 0) loss += weight * mean;
    if (threadIdx.x == 0 && !subnet_ce) static_cast<Real*>(p.terms)[s] = static_cast<Real>(mean);
  }
  if (threadIdx.x != 0) return;
  *static_cast<Real*>(p.loss) = static_cast<Real>(loss);
  if (counted.indices.wrong == 0) return;
  report[0] = counted.indices.index;
  report[1] = p.classes;
}

template <class T, int kGroup, int kVector>
void launch_loss(const Params& p, int64_t rows, const Workspace& w, int64_t* report, void* stream) {
  using Real = Compute<T>;
  constexpr int kGroups = kThreads / kGroup;
  const uint32_t row_count = static_cast<uint32_t>(rows);
  int64_t blocks = (rows + kGroups - 1) / kGroups;
  if (blocks > GKT_MAX_PARTIALS) blocks = GKT_MAX_PARTIALS;
  if (w.share_count > 0)
    launch<count_kernel>(dim3(static_cast<unsigned>(w.share_count)), dim3(kThreads), 0, stream, p,
                         row_count, w.shares);
  if (blocks > 0)
    dispatch_bool(p.streams - 1 <= p.groups, [&](auto once) {
      constexpr bool kOneLoop = decltype(once)::value;
      const auto m = SharedMemory<T, kGroup, kVector, kOneLoop>::of(p);
      launch<loss_kernel<T, kGroup, kVector, kOneLoop>>(dim3(static_cast<unsigned>(blocks)),
                                                        dim3(kThreads), m.bytes(), stream, p,
                                                        make_options<Real>(p), row_count, w, m);
    });
  launch<finish_kernel<Real>>(dim3(1), dim3(kThreads), 0, stream, p, row_count,
                              static_cast<int>(blocks), w, report);
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
  const auto all_aligned = [&](const gkt_stream_logits& streams) {
    return aligned(streams.logits, streams.class_stride, streams.stream_stride,
                   streams.row_strides) &&
           (streams.gradient == nullptr ||
            aligned(streams.gradient, streams.gradient_class_stride, streams.gradient_stream_stride,
                    streams.gradient_row_strides));
  };
  return all_aligned(p.full) && (p.streams == 1 || all_aligned(p.subnets));
}

template <class T>
void launch_for(const Params& p, int64_t rows, const Workspace& w, int64_t* report, void* stream) {
  constexpr int64_t kMostStreamsPerThread = 16;  // whose sums fit into shared memory
  const bool rows_adjacent = p.full.row_strides[p.row_dims - 1] == 1 && p.full.class_stride != 1;
  // In double exp takes longer than access does: wide accesses would not be worth their kernels.
  constexpr int kVector = std::is_same_v<T, double> ? 1 : kVectorSize<T>;
  const bool vectors = vectorizable<T>(p);
  if (rows_adjacent && p.classes <= kMostClassesPerWarp && p.streams <= kMostStreamsPerThread)
    launch_loss<T, 1, 1>(p, rows, w, report, stream);
  else if (p.classes <= kMostClassesPerWarp && vectors)
    launch_loss<T, kWarpSize, kVector>(p, rows, w, report, stream);
  else if (p.classes <= kMostClassesPerWarp)
    launch_loss<T, kWarpSize, 1>(p, rows, w, report, stream);
  else if (vectors)
    launch_loss<T, kThreads, kVector>(p, rows, w, report, stream);
  else
    launch_loss<T, kThreads, 1>(p, rows, w, report, stream);
}

}  // namespace
}  // namespace gkt

extern "C" int64_t gkt_group_knowledge_loss_workspace_cuda(
    const gkt_group_knowledge_loss_params* params) {
  return gkt::kMaxCountBlocks * int64_t{sizeof(gkt::ClassIndices)} +
         GKT_MAX_PARTIALS * (params->streams + 1) * int64_t{sizeof(double)};
}

extern "C" int gkt_group_knowledge_loss_cuda(const gkt_group_knowledge_loss_params* params,
                                             void* workspace, int64_t* report, void* stream) {
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
      const gkt::Workspace w = gkt::workspace_at(workspace, *params, rows);
      gkt::launch_for<T>(*params, rows, w, report, stream);
    });
  });
}
