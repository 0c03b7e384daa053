// The kernel of csrc/cuda on the CPU.
#include "cuda/looped_blocks/looped_blocks_sm80.cu"

#include "emulator.h"

extern "C" int run_looped_blocks(const void* parameters, int num_blocks, unsigned seed) {
  const auto& given = *static_cast<const loopmdm::KernelParameters*>(parameters);
  return emulator::run(num_blocks, loopmdm::Config::kComputeThreads, seed,
                       [&] { looped_blocks_sm80(given); });
}
