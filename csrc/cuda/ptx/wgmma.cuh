// Products of a warp group: 64 rows by N columns by 16, bf16 in, fp32 sums. `sums` are N / 2 floats a thread,
// see common/fragment.h. Between `products_begin` and `products_wait` nobody else may touch sums and left
// operands.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `kPending` groups of products are under way.
template <int kPending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving what makes values, or reads them, to the other side of this. Sums are read
// behind the wait: the compiler knows only that the products, not the wait, write them.
__device__ inline void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ inline void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }
template <class Value, int kNumber>
__device__ inline void pin(Value (&values)[kNumber]) {
#pragma unroll
  for (int i = 0; i < kNumber; ++i) pin(values[i]);
}

// Before products: their sums and left operands in registers must have been written by now.
template <class... Values>
__device__ inline void products_begin(Values&... values) {
  (pin(values), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Left operand from shared memory (descriptor) or from registers. An operand in shared memory lies with its
// inner dimension along rows, or where it is said to be outer-major with its outer one.
template <int kColumns>
struct WarpGroupProduct;

#define LOOPMDM_NUMBERS_4 "%0, %1, %2, %3"
#define LOOPMDM_NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LOOPMDM_NUMBERS_16 LOOPMDM_NUMBERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LOOPMDM_NUMBERS_32 \
  LOOPMDM_NUMBERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LOOPMDM_NUMBERS_48 \
  LOOPMDM_NUMBERS_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LOOPMDM_NUMBERS_64                                                             \
  LOOPMDM_NUMBERS_32                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LOOPMDM_NUMBERS_96                                                                                 \
  LOOPMDM_NUMBERS_64                                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LOOPMDM_NUMBERS_128                                                                      \
  LOOPMDM_NUMBERS_64                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define LOOPMDM_SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define LOOPMDM_SUMS_16(i) \
  LOOPMDM_SUMS_4(i), LOOPMDM_SUMS_4(i + 4), LOOPMDM_SUMS_4(i + 8), LOOPMDM_SUMS_4(i + 12)
#define LOOPMDM_ALL_SUMS_4 LOOPMDM_SUMS_4(0)
#define LOOPMDM_ALL_SUMS_8 LOOPMDM_SUMS_4(0), LOOPMDM_SUMS_4(4)
#define LOOPMDM_ALL_SUMS_16 LOOPMDM_SUMS_16(0)
#define LOOPMDM_ALL_SUMS_32 LOOPMDM_SUMS_16(0), LOOPMDM_SUMS_16(16)
#define LOOPMDM_ALL_SUMS_48 LOOPMDM_ALL_SUMS_32, LOOPMDM_SUMS_16(32)
#define LOOPMDM_ALL_SUMS_64 LOOPMDM_ALL_SUMS_48, LOOPMDM_SUMS_16(48)
#define LOOPMDM_ALL_SUMS_96 LOOPMDM_ALL_SUMS_64, LOOPMDM_SUMS_16(64), LOOPMDM_SUMS_16(80)
#define LOOPMDM_ALL_SUMS_128 \
  LOOPMDM_ALL_SUMS_64, LOOPMDM_SUMS_16(64), LOOPMDM_SUMS_16(80), LOOPMDM_SUMS_16(96), LOOPMDM_SUMS_16(112)

// n0..n6: numbers of the operands that follow the sums.
#define LOOPMDM_PRODUCT(columns, number, n0, n1, n2, n3, n4, n5, n6)                                       \
  template <>                                                                                              \
  struct WarpGroupProduct<columns> {                                                                       \
    template <bool kLeftOuter = false, bool kRightOuter = false>                                           \
    __device__ static void shared(float (&sums)[number], uint64_t left, uint64_t right, bool add) {        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2                                                \
                   ", 0;\n"                                                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #columns                                            \
                   "k16.f32.bf16.bf16 "                                                                    \
                   "{" LOOPMDM_NUMBERS_##number "}, %" #n0 ", %" #n1 ", p, 1, 1, %" #n3 ", %" #n4 ";\n}"   \
                   : LOOPMDM_ALL_SUMS_##number                                                             \
                   : "l"(left), "l"(right), "r"(static_cast<int>(add)), "n"(static_cast<int>(kLeftOuter)), \
                     "n"(static_cast<int>(kRightOuter)));                                                  \
    }                                                                                                      \
    template <bool kOuterMajor>                                                                            \
    __device__ static void registers(float (&sums)[number], const uint32_t* left, uint64_t right,          \
                                     bool add) {                                                           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5                                                \
                   ", 0;\n"                                                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #columns                                            \
                   "k16.f32.bf16.bf16 "                                                                    \
                   "{" LOOPMDM_NUMBERS_##number "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4       \
                                                ", p, 1, 1, %" #n6 ";\n}"                                  \
                   : LOOPMDM_ALL_SUMS_##number                                                             \
                   : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right),                   \
                     "r"(static_cast<int>(add)), "n"(static_cast<int>(kOuterMajor)));                      \
    }                                                                                                      \
  }

LOOPMDM_PRODUCT(8, 4, 4, 5, 6, 7, 8, 9, 10);
LOOPMDM_PRODUCT(16, 8, 8, 9, 10, 11, 12, 13, 14);
LOOPMDM_PRODUCT(32, 16, 16, 17, 18, 19, 20, 21, 22);
LOOPMDM_PRODUCT(64, 32, 32, 33, 34, 35, 36, 37, 38);
LOOPMDM_PRODUCT(96, 48, 48, 49, 50, 51, 52, 53, 54);
LOOPMDM_PRODUCT(128, 64, 64, 65, 66, 67, 68, 69, 70);
LOOPMDM_PRODUCT(192, 96, 96, 97, 98, 99, 100, 101, 102);
LOOPMDM_PRODUCT(256, 128, 128, 129, 130, 131, 132, 133, 134);

#undef LOOPMDM_PRODUCT

}  // namespace loopmdm
