#include "cpu/vector/peak.h"

#include <chrono>
#include <numeric>
#include <vector>

#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {

constexpr int64_t kRoundsPerLook = 20000;  // between two looks at the clock: 0.1 ms, or 1 ms of AMX

}  // namespace

double peak_flops(bool dtype_is_bf16, Isa isa, int num_threads, double milliseconds) {
  using Clock = std::chrono::steady_clock;
  const PeakKernel& kernel = peak_kernel(isa);
  const auto chains = dtype_is_bf16 ? kernel.bf16 : kernel.fp32;
  const double flops_per_round = dtype_is_bf16 ? kernel.bf16_flops_per_round : kernel.fp32_flops_per_round;
  std::vector<double> rates(static_cast<size_t>(num_threads));
  parallel(num_threads, [&](Worker& worker) {
    const auto begin = Clock::now();
    std::chrono::duration<double> spent{};
    int64_t rounds = 0;
    do {
      chains(kRoundsPerLook, 1.0f);
      rounds += kRoundsPerLook;
      spent = Clock::now() - begin;
    } while (1e3 * spent.count() < milliseconds);
    rates[static_cast<size_t>(worker.index)] = flops_per_round * static_cast<double>(rounds) / spent.count();
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace loopmdm::cpu
