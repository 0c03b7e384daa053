// The grid barrier of CUDA itself, beside those of hopper_probes.cu.
#include <cooperative_groups.h>

#include "cuda/ptx/memory.cuh"

struct Arguments {  // of hopper_probes.cu
  int32_t* counters;
  const float4* buffer;
  float* sink;
  int64_t vectors;
  int32_t rounds;
};

extern "C" __global__ void meet_by_grid_sync(const __grid_constant__ Arguments given) {
  for (int round = 0; round < given.rounds; ++round) cooperative_groups::this_grid().sync();
}
