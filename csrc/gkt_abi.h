// The flat C interface between Python and the kernels: raw addresses, element strides, enums.
// Nothing here knows torch or Python, so one build serves every torch version.
#pragma once

#include <stdint.h>

#define GKT_ABI_VERSION 1

enum gkt_dtype { GKT_FLOAT32 = 0, GKT_FLOAT64 = 1, GKT_BFLOAT16 = 2, GKT_FLOAT16 = 3 };

// GKT_OK or the reason; gkt_last_error() has the text, per thread.
enum gkt_status { GKT_OK = 0, GKT_INVALID = 1, GKT_FAILED = 2 };

#ifdef __cplusplus
extern "C" {
#endif

const char* gkt_last_error(void);

#ifdef __cplusplus
}
#endif
