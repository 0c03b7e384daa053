// The kernel of csrc/cuda on the CPU.
#include "cuda/looped_blocks/refresh_weights.cu"

#include "emulator.h"

extern "C" int run_refresh_weights(const void* chunks, uint64_t* fingerprints, int num_chunks) {
  const loopmdm::RefreshArguments given{static_cast<const loopmdm::Chunk*>(chunks), fingerprints};
  return emulator::run(num_chunks, loopmdm::kRefreshThreads, 0, [&] { refresh_weights(given); });
}
