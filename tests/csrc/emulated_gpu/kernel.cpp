// A kernel of csrc/cuda on the CPU: LOOPMDM_SOURCE is its file, LOOPMDM_KERNEL its name.
#include LOOPMDM_SOURCE

#include "emulator.h"

template <class Parameters>
int run(void (*kernel)(Parameters), const void* given, int num_blocks, int threads, unsigned seed) {
  const auto& parameters = *static_cast<const Parameters*>(given);
  return emulator::run(num_blocks, threads, seed, [&] { kernel(parameters); });
}

extern "C" int64_t loaded_weight_bytes() { return emulator::weight_bytes; }

extern "C" void plant(int number) { emulator::chosen_fault = number; }

extern "C" const char* fault() { return emulator::fault.c_str(); }

extern "C" int run_kernel(const void* given, int num_blocks, int threads, unsigned seed) {
  return run(LOOPMDM_KERNEL, given, num_blocks, threads, seed);
}
