// The kernels of the vocabulary head on the CPU, for one value of each of their macros.
#include "cuda/head/head_logits_sm90.cu"
#include "cuda/head/masked_cross_entropy_backward_sm90.cu"
#include "cuda/head/masked_cross_entropy_combine_sm90.cu"
#include "cuda/head/masked_cross_entropy_product_sm90.cu"
#include "cuda/head/masked_cross_entropy_sm90.cu"
#include "cuda/head/modulated_rows_backward_sm90.cu"
#include "cuda/head/modulated_rows_sm90.cu"
#include "cuda/head/sample_rows_combine_sm90.cu"
#include "cuda/head/sample_rows_sm90.cu"
#include "emulator.h"

template <class Parameters>
int run(void (*kernel)(Parameters), const void* given, int blocks, int threads, unsigned seed) {
  const auto& parameters = *static_cast<const Parameters*>(given);
  return emulator::run_apart(blocks, threads, seed, [&] { kernel(parameters); });
}

extern "C" void plant(int number) { emulator::chosen_fault = number; }

extern "C" const char* fault() { return emulator::fault.c_str(); }

#define EXPORT(name)                                                                     \
  extern "C" int run_##name(const void* given, int blocks, int threads, unsigned seed) { \
    return run(name, given, blocks, threads, seed);                                      \
  }

EXPORT(masked_cross_entropy_backward_sm90)
EXPORT(masked_cross_entropy_combine_sm90)
EXPORT(masked_cross_entropy_sm90)
EXPORT(masked_cross_entropy_product_sm90)
EXPORT(head_logits_sm90)
EXPORT(modulated_rows_backward_sm90)
EXPORT(modulated_rows_sm90)
EXPORT(sample_rows_sm90)
EXPORT(sample_rows_combine_sm90)
