// The one parallel loop: OpenMP when built with it, serial otherwise. The thread count is an
// argument (torch.get_num_threads()), so that our loops and torch's share one pool of threads.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gkt {
namespace {

// Calls body(begin, end, thread) on contiguous, evenly sized ranges of [0, count).
template <class Body>
inline void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads > count) threads = static_cast<int>(count);
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
      const int64_t begin = count * rank / team, end = count * (rank + 1) / team;
      if (begin < end) body(begin, end, static_cast<int>(rank));
    }
    return;
  }
#endif
  if (count > 0) body(static_cast<int64_t>(0), count, 0);
}

}  // namespace
}  // namespace gkt
