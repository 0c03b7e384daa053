// Phases of the backward table, in the order of loopmdm_kernels/schedule/backward/table.py.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

namespace backward {

enum Phase : int32_t {
  kNorm1,
  kQkv,
  kAttention,
  kAttnOut,
  kNorm2,
  kMlpIn,
  kMlpOut,
  kTop,
  kGradWide,
  kGradNorm2,
  kMiddle,
  kGradMixed,
  kGradQueries,
  kGradKeys,
  kGradNorm1,
  kBottom,
  kWeightMlpOut,
  kWeightMlpIn,
  kWeightAttnOut,
  kWeightQkv,
  kNothing,  // of a sequence that does not take part in the loop: only the signal
  kEnd
};

}  // namespace backward

}  // namespace loopmdm
