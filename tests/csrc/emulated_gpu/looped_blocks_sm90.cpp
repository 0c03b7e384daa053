// The kernel of csrc/cuda on the CPU.
#include "cuda/looped_blocks/looped_blocks_sm90.cu"

#include "emulator.h"

extern "C" int64_t loaded_weight_bytes() { return emulator::weight_bytes; }

extern "C" int run_looped_blocks(const void* parameters, int num_blocks, unsigned seed) {
  const auto& given = *static_cast<const loopmdm::KernelParameters*>(parameters);
  return emulator::run(num_blocks, loopmdm::kThreads, seed, [&] { looped_blocks_sm90(given); });
}
