// The backward kernel of csrc/cuda on the CPU.
#include "cuda/looped_blocks/looped_blocks_backward_sm90.cu"

#include "emulator.h"

extern "C" int run_looped_blocks_backward(const void* parameters, int num_blocks, unsigned seed) {
  const auto& given = *static_cast<const loopmdm::backward::Parameters*>(parameters);
  return emulator::run(num_blocks, loopmdm::kThreads, seed, [&] { looped_blocks_backward_sm90(given); });
}
