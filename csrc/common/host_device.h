// Headers in csrc/common compile for the host and for the device. Their functions have internal linkage:
// several copies of a kernel, built with different instruction sets, link into one module, and an inline
// function with external linkage would be shared between them, with the instructions of any one.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#  define LOOPMDM_HD static inline __host__ __device__
#else
#  define LOOPMDM_HD [[maybe_unused]] static inline
#endif
