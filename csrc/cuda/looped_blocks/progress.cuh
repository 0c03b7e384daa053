// What one warp waits for before a tile may begin: that its sequence takes part in the loop, and its inputs.
#pragma once

#include "cuda/tile/config.cuh"

namespace loopmdm {

// One value for the whole warp, whose lanes must not part ways when it changes meanwhile: one of them loads
// it.
__device__ inline int32_t load_together(const int32_t* address) {
  int32_t value = 0;
  if (threadIdx.x % 32 == 0) value = load_acquire(address);
  return __shfl_sync(~0u, value, 0);
}

// Waits until it is known whether the sequence takes part in this loop; LEAVE learns which was the last.
__device__ inline bool takes_part(const Parameters& p, const Instruction& item, int32_t& loop) {
  if (item.phase == kEnter) return true;
  if (!p.adaptive) {  // nobody stops a sequence before its last loop, which is known from the start
    const int32_t last = __ldg(p.stop + item.sequence);
    if (item.phase == kLeave) loop = last;
    return item.phase == kLeave || loop < last;
  }
  const int32_t* progress = p.progress(item.sequence);
  wait_for(progress, item.phase == kLeave ? kFinal : item.phase == kExit ? loop : loop + 1);
  const int32_t stop = load_together(p.stop + item.sequence);
  if (item.phase == kLeave) loop = stop;
  return item.phase == kLeave || loop < stop;
}

// Whether no sequence takes part in this loop or a later one.
__device__ inline bool all_stopped(const Parameters& p, int32_t loop) {
  return load_together(p.settled()) >= p.batch && loop >= load_together(p.longest());
}

__device__ inline void wait_for_inputs(const Parameters& p, const Instruction& item, int32_t loop) {
  const int32_t target = generation(Config::kBlocks * item.wait_count, loop);
  for (int i = threadIdx.x % 32; i < item.wait_number; i += 32) wait_for(p.counters + item.wait + i, target);
  __syncwarp();
}

}  // namespace loopmdm
