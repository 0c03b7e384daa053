// Global memory shared by blocks that run at the same time: signals, waits, loads that bypass L1.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

// How long a wait may last before it ends the kernel with an error, in nanoseconds: less than the 32 bits
// that are read of the clock. A kernel that is right waits for single tiles; one that is wrong would hold
// the GPU.
#define LOOPMDM_LONGEST_WAIT "2000000000"

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline uint8_t* dynamic_shared_memory() {
  extern __shared__ uint8_t memory[];
  return memory;
}

__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

__device__ inline float2 load_shared_pair(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
}

__device__ inline void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ inline void store_shared_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ inline void store_shared_four(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ inline void store_shared_pair(uint32_t address, float2 pair) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(pair.x), "f"(pair.y) : "memory");
}

// A load that acquires empties L1. So a wait acquires once, behind its last try, by a fence that PTX has for
// Hopper from CUDA 12.8 on; elsewhere each try does.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && \
    100 * __CUDACC_VER_MAJOR__ + __CUDACC_VER_MINOR__ >= 1208
#  define LOOPMDM_TRY "ld.relaxed.gpu.global.b32 value, [%0];\n"
#  define LOOPMDM_TRIED "fence.acquire.gpu;\n"
#else
#  define LOOPMDM_TRY "ld.acquire.gpu.global.b32 value, [%0];\n"
#  define LOOPMDM_TRIED
#endif

__device__ inline int32_t load_acquire(const int32_t* address) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline void store_release(int32_t* address, int32_t value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ inline void add_release(int32_t* address, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ inline void raise_to(int32_t* address, int32_t value) { atomicMax(address, value); }

// Until a counter that only grows has reached `target`. The clock is read only by who has to wait, while a
// load is under way. A loop in C++ with an exit of its own would serialise the products of the kernel.
__device__ inline void wait_for(const int32_t* counter, int32_t target) {
  asm volatile(
      "{\n"
      ".reg .pred reached, late;\n"
      ".reg .s32 value;\n"
      ".reg .u32 begin, now;\n" LOOPMDM_TRY
      "setp.ge.s32 reached, value, %1;\n"
      "@reached bra DONE;\n"
      "mov.u32 begin, %%globaltimer_lo;\n"
      "AGAIN:\n"
      "nanosleep.u32 20;\n" LOOPMDM_TRY
      "mov.u32 now, %%globaltimer_lo;\n"
      "setp.ge.s32 reached, value, %1;\n"
      "@reached bra DONE;\n"
      "sub.u32 now, now, begin;\n"
      "setp.gt.u32 late, now, " LOOPMDM_LONGEST_WAIT
      ";\n"
      "@!late bra AGAIN;\n"
      "trap;\n"
      "DONE:\n" LOOPMDM_TRIED "}" ::"l"(counter),
      "r"(target)
      : "memory");
}

// Orders ordinary accesses to global memory with those of TMA, which are of another proxy: before a signal,
// for what was stored; after a wait, for what TMA will load.
__device__ inline void proxy_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The same for shared memory: before products read what threads have stored, or a stage that they have
// written to is filled again.
__device__ inline void shared_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Every loop reads the weights again: they shall outlive in L2 what is read once.
__device__ inline uint64_t keep_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// What another block has written lies in L2; a line of it in L1 may be old.
__device__ inline float2 load_pair(const float* address) {
  return __ldcg(reinterpret_cast<const float2*>(address));
}

// Stores to global memory that other threads of the kernel read are all made by these two: the emulator of
// the tests looks for their order there.
template <class T>
__device__ inline void store(T* address, T value) {
  *address = value;
}

__device__ inline void store_pair(float* address, float2 value) {
  store(reinterpret_cast<float2*>(address), value);
}

// What no block writes may lie in L1.
__device__ inline float2 load_constant_pair(const float* address) {
  return __ldg(reinterpret_cast<const float2*>(address));
}

}  // namespace loopmdm
