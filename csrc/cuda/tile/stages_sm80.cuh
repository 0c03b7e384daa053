// Shared memory of a block as a ring of stages, which all threads fill by asynchronous copies and then read.
#pragma once

#include "common/swizzle.h"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/tile/config_sm80.cuh"

namespace loopmdm {

// Calls copy(place, row, chunk) for the thread's share of kNumber rows of kChunks times 16 bytes, which lie
// in panels as common/swizzle.h says.
template <int kNumber, int kChunks, class Copy>
__device__ void copy_pieces(uint32_t target, const Copy& copy) {
  constexpr int kTogether = Config::kComputeThreads / kChunks;  // rows
  static_assert(kTogether % 8 == 0 && kNumber % kTogether == 0, "rows of a thread have the same swizzle");
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  const uint32_t place = target + panel_offset(first, chunk, kNumber, 16);
#pragma unroll
  for (int row = 0; row < kNumber; row += kTogether) {
    copy(place + row * kSwizzleRowBytes, first + row, chunk);
  }
}

// Rows of a buffer, `stride` bytes apart; those from `inside` on become zero.
template <int kNumber, int kChunks>
__device__ void copy_rows(uint32_t target, const void* source, int64_t stride, int inside) {
  copy_pieces<kNumber, kChunks>(target, [=](uint32_t place, int row, int chunk) {
    const bool there = row < inside;
    copy_16(place, static_cast<const uint8_t*>(source) + (there ? row * stride : 0) + 16 * chunk, there);
  });
}

// The stages of one tile, in order. A tile begins with all of them free.
class Stages {
 public:
  __device__ explicit Stages(uint32_t memory) : memory_(memory) {}

  __device__ uint32_t address(uint32_t slot) const { return memory_ + slot * Config::kStageBytes; }

  // load(number, address) starts the copies of a stage, if there is one of this number.
  template <class Load>
  __device__ void begin(const Load& load) const {
#pragma unroll 1
    for (int number = 0; number < Config::kStages - 1; ++number) {
      load(number, address(number));
      copies_commit();
    }
  }

  // Address of the next stage, which is full. All warps have read the one before: it is filled again.
  template <class Load>
  __device__ uint32_t next(const Load& load) {
    copies_wait<Config::kStages - 2>();
    __syncthreads();
    load(number_ + Config::kStages - 1, address(slot_ == 0 ? Config::kStages - 1 : slot_ - 1));
    copies_commit();
    const uint32_t full = address(slot_);
    slot_ = slot_ + 1 == Config::kStages ? 0 : slot_ + 1;
    ++number_;
    return full;
  }

 private:
  uint32_t memory_, slot_ = 0;
  int number_ = 0;
};

}  // namespace loopmdm
