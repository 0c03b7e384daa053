// Headers in csrc/common compile for the host and for the device. Their functions have internal linkage:
// several copies of a kernel, built with different instruction sets, link into one module, and an inline
// function with external linkage would be shared between them, with the instructions of any one.
#pragma once

#if defined(__CUDACC_RTC__)  // has no standard headers
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#  include <stdint.h>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#  define LOOPMDM_HD static inline __host__ __device__
#else
#  define LOOPMDM_HD [[maybe_unused]] static inline
#endif
