// What the schedule of the Hopper kernel costs outside its arithmetic: meetings of blocks, and reading from
// L2.
#include "cuda/ptx/memory.cuh"

using namespace loopmdm;

struct Arguments {
  int32_t* counters;  // zero at the start
  const float4* buffer;
  float* sink;      // written by nobody; keeps the reads
  int64_t vectors;  // of 16 bytes, in the buffer
  int32_t rounds;
};

// One counter for the grid; every round is a generation of it.
extern "C" __global__ void meet_at_one_counter(const __grid_constant__ Arguments given) {
  for (int round = 1; round <= given.rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(given.counters, 1);
      wait_for(given.counters, round * static_cast<int>(gridDim.x));
    }
    __syncthreads();
  }
}

// A counter for each row of twelve blocks, 128 bytes apart, as the tiles of a phase have them.
extern "C" __global__ void meet_at_row_counters(const __grid_constant__ Arguments given) {
  const int row = blockIdx.x / 12, members = min(12, static_cast<int>(gridDim.x) - 12 * row);
  int32_t* const counter = given.counters + 32 * row;
  for (int round = 1; round <= given.rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(counter, 1);
      wait_for(counter, round * members);
    }
    __syncthreads();
  }
}

extern "C" __global__ void meet_in_cluster(const __grid_constant__ Arguments given) {
  for (int round = 0; round < given.rounds; ++round) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
  }
}

// Every block reads all of the buffer, `rounds` times, each from another place on.
extern "C" __global__ void read_all(const __grid_constant__ Arguments given) {
  float sum = 0;
  for (int round = 0; round < given.rounds; ++round) {
    for (int64_t i = threadIdx.x; i < given.vectors; i += blockDim.x) {
      int64_t place = i + given.vectors / gridDim.x * blockIdx.x;
      if (place >= given.vectors) place -= given.vectors;
      const float4 value = __ldcg(given.buffer + place);
      sum += value.x + value.y + value.z + value.w;
    }
  }
  if (sum == 1e30f) *given.sink = sum;
}

// Each round's loads wait for those of the round before, as the rows of a phase do.
extern "C" __global__ void load_in_turn(const __grid_constant__ Arguments given) {
  constexpr int kTogether = 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTogether * blockDim.x + threadIdx.x;
  int64_t place = first;
  for (int round = 0; round < given.rounds; ++round) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) sum += __ldcg(given.buffer + place + i * blockDim.x).x;
    if (sum == 1e30f) *given.sink = sum;
    place += kTogether * static_cast<int64_t>(gridDim.x * blockDim.x) + static_cast<int>(sum);  // of zeros
    if (place + kTogether * blockDim.x > given.vectors) place = first;
  }
}

extern "C" __global__ void do_nothing(const __grid_constant__ Arguments given) {}

// Lets the next kernel come early, and waits for the end of the one before.
extern "C" __global__ void do_nothing_early(const __grid_constant__ Arguments given) {
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}
