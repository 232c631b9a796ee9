// The flat C interface between Python and the kernels: raw addresses, element strides, enums.
// Nothing here knows torch or Python, so one build serves every torch version.
#pragma once

#include <stdint.h>

#define GKT_ABI_VERSION 6

enum gkt_dtype { GKT_FLOAT32 = 0, GKT_FLOAT64 = 1, GKT_BFLOAT16 = 2, GKT_FLOAT16 = 3 };

// GKT_OK or the reason; gkt_last_error() has the text, per thread. GKT_UNSUPPORTED: this build
// can't run on the GPU or driver that is here, and never will.
enum gkt_status { GKT_OK = 0, GKT_INVALID = 1, GKT_FAILED = 2, GKT_UNSUPPORTED = 3 };

// An activation seen as (batch, channel, position), positions being all spatial places. Strides in
// elements.
struct gkt_activation {
  void* data;
  int64_t batch_stride, channel_stride, position_stride;
};

// ghost_batch_norm. Statistics and parameters are float, or double for double activations;
// statistics are (3, ghosts, channels): mean, what rounding took from the mean, biased variance.
// channels_last: channel_stride is 1 and batch_stride is positions * position_stride; otherwise
// position_stride is 1. `mask` has one bit per element, 1 where the gradient passes the ReLU: rows
// of ceil(length / 8) bytes, lowest bit first, one per (batch, position) of length channels in
// channels_last, else one per (batch, channel) of length positions; unused bits are 0.
// The first ghost batch has lead_rows batch rows, each other one ghost_rows; where there is one
// only, ghost_rows is lead_rows.
struct gkt_ghost_batch_norm_params {
  struct gkt_activation x, residual, y, grad_y, grad_x, grad_residual;
  uint8_t* mask;        // null without ReLU
  const void* weight;   // (channels), null for 1
  const void* bias;     // (channels), null for 0
  void* statistics;     // in when use_running, else out of the forward pass and into the backward
  const uint8_t* keep;  // (ghosts), null for all
  // (channels) each, null for none; of a single ghost batch, whose statistics, the variance
  // unbiased, the forward pass mixes in: r = (1 - momentum) r + momentum * statistic.
  void* running_mean;
  void* running_var;
  void* grad_weight;  // (channels)
  void* grad_bias;    // (channels)
  void* workspace;  // CUDA: gkt_ghost_batch_norm_workspace_cuda() elements of the statistics' dtype
  int64_t ghosts, lead_rows, ghost_rows, channels, positions;
  double eps, momentum;
  int32_t dtype, channels_last, relu, use_running;
};

// Rows of a tensor: its batch and spatial dimensions, merged where memory allows, the innermost
// last.
#define GKT_MAX_ROW_DIMS 8

// Blocks of a CUDA kernel that each leave sums behind.
#define GKT_MAX_PARTIALS 1024

// Logits of streams that lie in one tensor, and their gradient: each row at the sum of its
// dimensions' index times stride, in elements.
struct gkt_stream_logits {
  const void* logits;
  void* gradient;  // times gradient_scale, of the logits' dtype; NULL: none wanted
  int64_t stream_stride, class_stride;
  int64_t gradient_stream_stride, gradient_class_stride;
  int64_t row_strides[GKT_MAX_ROW_DIMS];
  int64_t gradient_row_strides[GKT_MAX_ROW_DIMS];
};

// group_knowledge_loss: S streams of rows of C classes. The full network has every row, subnets
// have the first subnet_rows of them.
typedef struct {
  struct gkt_stream_logits full, subnets;
  const void* targets;  // int64 class indices, or probabilities of the compute dtype
  void* loss;           // one value of the compute dtype (double for double, float otherwise)
  void* terms;          // S values of the compute dtype
  int32_t dtype;        // gkt_dtype of the logits
  int32_t probabilities;
  int64_t streams, classes, groups, subnet_rows;
  int32_t row_dims;
  int64_t row_sizes[GKT_MAX_ROW_DIMS];
  int64_t targets_row_strides[GKT_MAX_ROW_DIMS];
  int64_t targets_class_stride;
  double ema, temperature, eps, ce_weight, kd_weight, subnet_ce_weight, label_smoothing;
  double gradient_scale;
  int64_t ignore_index;
  int32_t normalize_logits, distill_ignored;
} gkt_group_knowledge_loss_params;

#ifdef __cplusplus
extern "C" {
#endif

int gkt_ghost_batch_norm_fwd_cpu(const struct gkt_ghost_batch_norm_params* params, int threads);
int gkt_ghost_batch_norm_bwd_cpu(const struct gkt_ghost_batch_norm_params* params, int threads);
int gkt_ghost_batch_norm_fwd_cuda(const struct gkt_ghost_batch_norm_params* params, void* stream);
int gkt_ghost_batch_norm_bwd_cuda(const struct gkt_ghost_batch_norm_params* params, void* stream);
int64_t gkt_ghost_batch_norm_workspace_cuda(const struct gkt_ghost_batch_norm_params* params);

const char* gkt_last_error(void);

int gkt_group_knowledge_loss_cpu(const gkt_group_knowledge_loss_params* params, int threads);
// On the device: workspace, of so many bytes and aligned to 16; report (2), which a class index
// that is out of range overwrites with itself and the number of classes. The loss is then NaN, and
// so is the gradient of every cross entropy.
int64_t gkt_group_knowledge_loss_workspace_cuda(const gkt_group_knowledge_loss_params* params);
int gkt_group_knowledge_loss_cuda(const gkt_group_knowledge_loss_params* params, void* workspace,
                                  int64_t* report, void* stream);

#ifdef __cplusplus
}
#endif
