// ghost_batch_norm on the CPU: see gkt_fast/ops/ghost_batch_norm.py for the formula.
//
// Two passes each way: sums, then the affine map. What is summed together depends on shapes alone,
// so results don't depend on the thread count. Sums are shifted by a value of the data, hence exact
// for a large mean; the mean keeps what its rounding to float loses ("mean_low"), which goes into
// the additive constant of the affine map.
#include "cpu/ghost_batch_norm_planes.h"
#include "cpu/ghost_batch_norm_rows.h"
#include "cpu/isa.h"
#include "gkt_abi.h"
#include "guard.h"

namespace gkt {

GKT_FOR_EACH_ISA(void ghost_batch_norm_fwd(const gkt_ghost_batch_norm_params& params, int threads);
                 void ghost_batch_norm_bwd(const gkt_ghost_batch_norm_params& params, int threads);)

namespace GKT_ISA {
namespace {

template <bool backward, class Layout>
void run(const Layout& layout, bool relu, bool has_residual) {
  const auto go = [&](auto with_relu, auto with_residual) {
    constexpr bool r = decltype(with_relu)::value, s = decltype(with_residual)::value;
    if constexpr (backward)
      layout.template backward<r, s>();
    else
      layout.template forward<r, s>();
  };
  if (relu)
    has_residual ? go(Int<1>{}, Int<1>{}) : go(Int<1>{}, Int<0>{});
  else
    has_residual ? go(Int<0>{}, Int<1>{}) : go(Int<0>{}, Int<0>{});
}

template <bool backward, class T>
void run(const Params& p, int threads) {
  const bool has_residual = (backward ? p.grad_residual.data : p.residual.data) != nullptr;
  if (p.channels_last)
    run<backward>(Rows<T>(p, threads), p.relu, has_residual);
  else
    run<backward>(Planes<T>(p, threads), p.relu, has_residual);
}

template <bool backward>
void run(const Params& p, int threads) {
  switch (p.dtype) {
    case GKT_FLOAT32:
      return run<backward, float>(p, threads);
    case GKT_FLOAT64:
      return run<backward, double>(p, threads);
    case GKT_BFLOAT16:
      return run<backward, bfloat16>(p, threads);
    case GKT_FLOAT16:
      return run<backward, float16>(p, threads);
  }
}

}  // namespace

void ghost_batch_norm_fwd(const Params& p, int threads) { run<false>(p, threads); }
void ghost_batch_norm_bwd(const Params& p, int threads) { run<true>(p, threads); }

}  // namespace GKT_ISA
}  // namespace gkt

#if defined(GKT_ISA_baseline)

namespace gkt {
namespace {

void check(const gkt_ghost_batch_norm_params& p, int threads) {
  if (threads < 1) throw InvalidArgument("ghost_batch_norm: threads must be at least 1");
  if (p.ghosts < 1 || p.lead_rows < 1 || p.ghost_rows < 1 || p.channels < 1 || p.positions < 1)
    throw InvalidArgument("ghost_batch_norm: every size must be at least 1");
  if (p.running_mean != nullptr && (p.ghosts != 1 || p.use_running || p.running_var == nullptr))
    throw InvalidArgument("ghost_batch_norm: running statistics are those of one ghost batch");
  if (p.dtype < GKT_FLOAT32 || p.dtype > GKT_FLOAT16)
    throw InvalidArgument("ghost_batch_norm: unknown dtype");
  if (p.relu && p.mask == nullptr) throw InvalidArgument("ghost_batch_norm: ReLU needs a mask");
}

}  // namespace
}  // namespace gkt

extern "C" int gkt_ghost_batch_norm_fwd_cpu(const gkt_ghost_batch_norm_params* params,
                                            int threads) {
  return gkt::guarded([&] {
    gkt::check(*params, threads);
    GKT_BEST(ghost_batch_norm_fwd)(*params, threads);
  });
}

extern "C" int gkt_ghost_batch_norm_bwd_cpu(const gkt_ghost_batch_norm_params* params,
                                            int threads) {
  return gkt::guarded([&] {
    gkt::check(*params, threads);
    GKT_BEST(ghost_batch_norm_bwd)(*params, threads);
  });
}

#endif
