// The compiler's intrinsics of this instruction set. Included before the namespaces that vec.h lies in.
#pragma once

#if defined(__x86_64__)
#  include <immintrin.h>
#elif defined(__aarch64__)
#  include <arm_neon.h>
#endif
