// Finds the copy of a kernel table that was compiled for an instruction set.
#pragma once

#include "cpu/machine/isa.h"

#if defined(__x86_64__)
#  define LOOPMDM_DECLARE_KERNEL(Type, name) \
    namespace generic {                      \
    extern const Type name;                  \
    }                                        \
    namespace avx2 {                         \
    extern const Type name;                  \
    }                                        \
    namespace avx512 {                       \
    extern const Type name;                  \
    }                                        \
    namespace avx512_bf16 {                  \
    extern const Type name;                  \
    }                                        \
    namespace amx_bf16 {                     \
    extern const Type name;                  \
    }
#  define LOOPMDM_KERNEL(name, isa)                     \
    (*((isa) == Isa::amx_bf16      ? &amx_bf16::name    \
       : (isa) == Isa::avx512_bf16 ? &avx512_bf16::name \
       : (isa) == Isa::avx512      ? &avx512::name      \
       : (isa) == Isa::avx2        ? &avx2::name        \
                                   : &generic::name))
#else
#  define LOOPMDM_DECLARE_KERNEL(Type, name) \
    namespace generic {                      \
    extern const Type name;                  \
    }
#  define LOOPMDM_KERNEL(name, isa) ((void)(isa), generic::name)
#endif
